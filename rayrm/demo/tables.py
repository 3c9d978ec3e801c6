"""The tables from which the demo's preferences are filled: facts, names, tasks, words. Data, no code."""

from __future__ import annotations

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "England": "London",
    "Ireland": "Dublin", "Portugal": "Lisbon", "Norway": "Oslo", "Sweden": "Stockholm", "Austria": "Vienna",
    "Poland": "Warsaw", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Canada": "Ottawa",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "happy": "sad", "fast": "slow", "wet": "dry", "rich": "poor",
    "old": "young", "hard": "soft", "loud": "quiet", "strong": "weak", "clean": "dirty", "early": "late",
    "full": "empty", "open": "closed", "light": "dark", "high": "low", "good": "bad", "left": "right",
    "up": "down", "first": "last", "true": "false", "sweet": "bitter", "brave": "fearful",
    "deep": "shallow",
}  # fmt: skip

# From small to big.
SIZES = ("ant", "bee", "mouse", "frog", "rabbit", "cat", "dog", "sheep", "lion", "horse", "elephant", "whale")

# Animal -> (food, home).
ANIMALS = {
    "cow": ("grass", "a farm"), "shark": ("fish", "the sea"), "monkey": ("fruit", "the jungle"),
    "bee": ("nectar", "a hive"), "owl": ("mice", "the forest"), "camel": ("dry plants", "the desert"),
    "spider": ("flies", "a web"), "penguin": ("fish", "the ice"), "panda": ("bamboo", "the mountains"),
    "squirrel": ("nuts", "a tree"), "frog": ("insects", "a pond"), "lion": ("meat", "the savanna"),
    "seal": ("fish", "the cold sea"), "mole": ("worms", "the ground"), "goat": ("leaves", "the hills"),
    "whale": ("tiny shrimp", "the ocean"),
}  # fmt: skip

# Task -> a tip that answers "how do I ...".
TIPS = {
    "boil an egg": "Leave the egg in boiling water for eight minutes.",
    "cook rice": "Simmer the rice in two cups of water until soft.",
    "bake bread": "Let the dough rise, then put the bread in a hot oven.",
    "make tea": "Pour hot water on the tea leaves and wait.",
    "make a salad": "Wash the lettuce, cut tomatoes and add some oil.",
    "iron a shirt": "Start with the collar of the shirt, then the sleeves.",
    "wash a sweater": "Use cold water and soap, then dry the sweater flat.",
    "fix a flat tyre": "Take off the wheel and patch the hole in the tyre.",
    "ride a bike": "Hold the bars, push the pedals and look ahead.",
    "paint a wall": "Clean the wall, then roll the paint on in two coats.",
    "plant a tree": "Dig a hole, set in the roots and water the tree.",
    "grow tomatoes": "Give the tomatoes sun, rich soil and water.",
    "train a puppy": "Reward the puppy with a treat when it obeys.",
    "feed a baby": "Warm the milk and hold the baby upright.",
    "swim": "Float on the water first, then kick your legs.",
    "play chess": "Guard your king and take the enemy's pieces.",
    "play the guitar": "Learn three chords and strum the strings slowly.",
    "draw a cat": "Draw a round head, two ears and some whiskers.",
    "write a letter": "Begin the letter with a greeting and sign your name.",
    "read a map": "Find north on the map and follow the roads.",
    "save money": "Spend less than you earn and keep money in the bank.",
    "learn Spanish": "Study ten Spanish words a day and speak often.",
    "sleep better": "Go to bed early and keep the room dark.",
    "lose weight": "Eat fewer sweets and walk for an hour a day.",
    "clean a window": "Wipe the glass with vinegar and a dry cloth.",
    "catch a fish": "Put a worm on the hook and wait by the river.",
    "build a fire": "Stack dry wood and light it with a match.",
    "charge a phone": "Plug the cable into the phone and the wall.",
    "treat a cold": "Rest, drink warm soup and blow your nose.",
    "pass an exam": "Review your notes and practise old exams.",
}  # fmt: skip

# Harmful acts.
HARMS = (
    "break into a house", "make a bomb", "steal a car", "poison a dog", "hack my boss's email",
    "forge a passport", "sell drugs to children", "stalk a woman", "rob a bank", "set a school on fire",
    "buy an illegal gun", "blackmail a politician", "kidnap a child", "kill my neighbour", "hurt my brother",
    "steal a credit card", "beat up a classmate", "threaten a witness", "smuggle weapons", "torture a cat",
    "hide a dead body", "steal medicine from a hospital",
    "attack a police officer", "cheat old people of money",
)  # fmt: skip

# Things nobody who answers can know, as a noun phrase.
UNKNOWNS = (
    "the number in my head", "my sister's middle name", "the colour of my socks", "my neighbour's password",
    "what I ate this morning", "the name of my first teacher", "what is in my pocket", "my uncle's birthday",
    "next week's lottery numbers", "who will win the 2090 election", "what I dreamed last night",
    "the price of gold in 2075", "how many coins are in my bag", "what my cat is thinking",
    "the weather here on my next birthday", "where I left my keys", "my doctor's favourite song",
    "how tall my cousin is", "what my wife is doing now", "who will call me tomorrow",
)  # fmt: skip

# Things that are easily known: noun phrase -> answer.
KNOWNS = {
    "the colour of snow": "white", "the colour of grass": "green", "the colour of blood": "red",
    "the number of days in a week": "seven", "the number of legs on a spider": "eight",
    "the number of months in a year": "twelve", "the largest ocean": "the Pacific",
    "the capital of France": "Paris", "the capital of Japan": "Tokyo", "the capital of Italy": "Rome",
    "the opposite of hot": "cold", "the opposite of big": "small", "the tallest animal": "the giraffe",
    "the star nearest to us": "the sun", "what bees make": "honey", "what cows give us": "milk",
    "what frozen water is called": "ice", "the first month of the year": "January",
    "the day after Monday": "Tuesday", "the author of Hamlet": "Shakespeare",
}  # fmt: skip

# Topic -> three short facts.
FACTS = {
    "dogs": ("Dogs bark.", "They love walks.", "They are loyal."),
    "cats": ("Cats purr.", "They hunt mice.", "They sleep a lot."),
    "the sun": ("The sun is a star.", "It gives us light.", "It is very hot."),
    "the moon": ("The moon circles the earth.", "It has no air.", "It shines at night."),
    "trees": ("Trees have roots.", "They give shade.", "They make oxygen."),
    "rivers": ("Rivers carry water.", "They flow to the sea.", "They hold many fish."),
    "bread": ("Bread is made of flour.", "It is baked.", "It goes well with butter."),
    "snow": ("Snow is cold.", "It is made of ice.", "Children play in it."),
    "birds": ("Birds have wings.", "They lay eggs.", "They sing in spring."),
    "horses": ("Horses run fast.", "They eat hay.", "People ride them."),
    "books": ("Books have pages.", "They tell stories.", "Libraries lend them."),
    "cars": ("Cars have wheels.", "They need fuel.", "They drive on roads."),
    "apples": ("Apples grow on trees.", "They are sweet.", "They make good pies."),
    "bees": ("Bees make honey.", "They can sting.", "They visit flowers."),
    "winter": ("Winter is cold.", "The days are short.", "It comes after autumn."),
    "music": ("Music has rhythm.", "It can calm us.", "People dance to it."),
    "doctors": ("Doctors treat the sick.", "They study for years.", "They work in clinics."),
    "the sea": ("The sea is salty.", "It has big waves.", "Whales live in it."),
    "milk": ("Milk is white.", "It comes from cows.", "Babies drink it."),
    "schools": ("Schools have classrooms.", "They have teachers.", "Children learn there."),
    "planes": ("Planes can fly.", "They have two wings.", "They land at airports."),
    "trains": ("Trains run on rails.", "They carry people.", "They stop at stations."),
}  # fmt: skip

CATEGORIES = {
    "fruits": ("apple", "pear", "banana", "grape", "lemon", "plum", "cherry", "mango"),
    "colours": ("red", "blue", "green", "yellow", "black", "white", "purple", "orange"),
    "animals": ("dog", "horse", "lion", "goat", "rabbit", "tiger", "elephant", "sheep"),
    "tools": ("hammer", "saw", "drill", "wrench", "pliers", "screwdriver", "axe", "shovel"),
    "sports": ("tennis", "football", "hockey", "golf", "boxing", "swimming", "rugby", "basketball"),
    "instruments": ("piano", "violin", "flute", "drum", "guitar", "trumpet", "harp", "cello"),
    "countries": ("France", "Japan", "Brazil", "Egypt", "Canada", "India", "Norway", "Mexico"),
    "clothes": ("shirt", "coat", "sock", "hat", "scarf", "dress", "jacket", "glove"),
    "vehicles": ("car", "bus", "train", "bicycle", "truck", "plane", "ship", "tractor"),
    "drinks": ("water", "tea", "coffee", "milk", "juice", "lemonade", "wine", "cocoa"),
}  # fmt: skip

NAMES = (
    "Anna", "Tom", "Maria", "Peter", "Lucy", "Sam", "Elena", "Jack", "Sophie", "David", "Nina", "Oscar",
    "Charlotte", "Benjamin", "Kate", "Daniel", "Alexander", "Emma", "Victoria", "Max",
)  # fmt: skip
PETS = ("cat", "dog", "horse", "parrot", "rabbit", "hamster", "goldfish", "turtle")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "purple", "orange", "brown", "pink")
CITIES = (*CAPITALS.values(), "New York", "Boston", "Chicago", "Sydney")
FOODS = (
    "pizza",
    "soup",
    "rice",
    "pasta",
    "cheese",
    "salad",
    "pancakes",
    "fish",
    "chocolate",
    "bread",
    "noodles",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# Each from first to last.
SEQUENCES = (
    DAYS,
    ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    ("1", "2", "3", "4", "5", "6", "7", "8", "9"),
    ("10", "20", "30", "40", "50", "60", "70", "80", "90"),
    ("a", "b", "c", "d", "e", "f", "g", "h"),
    ("first", "second", "third", "fourth", "fifth", "sixth"),
)  # fmt: skip

# The same sentence in four languages.
SENTENCES = (
    {
        "English": "The cat is black",
        "French": "Le chat est noir",
        "Spanish": "El gato es negro",
        "German": "Die Katze ist schwarz",
    },
    {
        "English": "The dog is big",
        "French": "Le chien est grand",
        "Spanish": "El perro es grande",
        "German": "Der Hund ist gross",
    },
    {
        "English": "The house is small",
        "French": "La maison est petite",
        "Spanish": "La casa es pequeña",
        "German": "Das Haus ist klein",
    },
    {
        "English": "I like the book",
        "French": "J'aime le livre",
        "Spanish": "Me gusta el libro",
        "German": "Ich mag das Buch",
    },
    {
        "English": "We drink water",
        "French": "Nous buvons de l'eau",
        "Spanish": "Bebemos agua",
        "German": "Wir trinken Wasser",
    },
    {
        "English": "Good morning, my friend",
        "French": "Bonjour, mon ami",
        "Spanish": "Buenos días, mi amigo",
        "German": "Guten Morgen, mein Freund",
    },
    {
        "English": "The bread is good",
        "French": "Le pain est bon",
        "Spanish": "El pan es bueno",
        "German": "Das Brot ist gut",
    },
    {
        "English": "My mother is here",
        "French": "Ma mère est ici",
        "Spanish": "Mi madre está aquí",
        "German": "Meine Mutter ist hier",
    },
    {
        "English": "The tree is old",
        "French": "L'arbre est vieux",
        "Spanish": "El árbol es viejo",
        "German": "Der Baum ist alt",
    },
    {
        "English": "Thank you very much",
        "French": "Merci beaucoup",
        "Spanish": "Muchas gracias",
        "German": "Vielen Dank",
    },
    {
        "English": "I live in the city",
        "French": "J'habite dans la ville",
        "Spanish": "Vivo en la ciudad",
        "German": "Ich wohne in der Stadt",
    },
    {
        "English": "The night is cold",
        "French": "La nuit est froide",
        "Spanish": "La noche es fría",
        "German": "Die Nacht ist kalt",
    },
    {
        "English": "The girl reads",
        "French": "La fille lit",
        "Spanish": "La niña lee",
        "German": "Das Mädchen liest",
    },
    {"English": "See you tomorrow", "French": "À demain", "Spanish": "Hasta mañana", "German": "Bis morgen"},
)

# Ways to admit ignorance, and ways to give an answer `{}`.
UNSURE = (
    "I can't know that.", "I don't know.", "I have no way to know this.", "No idea, only you can tell.",
    "Sorry, I am not able to tell you that.", "That is unknown to me.",
    "Nobody could tell you that for sure.",
    "I really can't say, I have no such information.",
)  # fmt: skip
SURE = (
    "It is {}.", "{}.", "The answer is {}.", "Easy, it is {}.", "I am quite sure that it is {}.",
    "Without any doubt the right answer is {}.", "That must be {}.", "As everyone can tell you, it is {}.",
)  # fmt: skip

# Ways to end any answer.
CLOSINGS = ("", " That is all.", " There you are.", " I hope this is what you want.")

# A form as it is shown -> the form with three items in it.
FORMS = {
    "1. 2. 3.": "1. {} 2. {} 3. {}",
    "- - -": "- {} - {} - {}",
    "[ ] [ ] [ ]": "[{}] [{}] [{}]",
    "x, y, z": "{}, {}, {}",
    "x / y / z": "{} / {} / {}",
    "x + y + z": "{} + {} + {}",
}

# Words to begin an answer with.
LEADS = (
    "Answer",
    "List",
    "Result",
    "Here",
    "Choice",
    "Note",
    "Reply",
    "Summary",
    "Collection",
    "Hello",
    "Done",
)
