"""`Figures` of preference data as text for people, within 100 columns, with what deserves attention. Pure."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

from rayrm.data.inspect import Figures

WIDTH = 100
MUCH_LONGER = 0.65
MANY_DROPPED = 0.05
MANY_REFUSED = 0.01  # `max_bad_row_fraction`
_LABEL = 18
_BAR = 44


def report(figures: Sequence[Figures]) -> str:
    """The sections of all sources, then a table of them where there are several."""
    parts = [section(one) for one in figures]
    return (
        "\n\n".join("\n".join(part) for part in [*parts, *([overview(figures)] if parts[1:] else [])]) + "\n"
    )


def overview(figures: Sequence[Figures]) -> list[str]:
    """One line a source, by what tells its name from the others'."""
    titles = ("rows", "refused", "left out", "mean tokens", "repeats", "conflicts", "longer wins")
    shared = len(os.path.commonprefix([one.name for one in figures[:-1]]).rpartition("/")[0])  # noqa: RUF071
    table: list[tuple[str, ...]] = [("", *titles)]
    for one in figures:
        name = one.name if one is figures[-1] else one.name[shared:].removeprefix("/")
        counts = (one.num_rows, sum(one.refused.values()), one.num_dropped)
        mean = f"{one.lengths['mean']:,.0f}" if one.lengths else "-"
        repeats = (one.num_duplicates, one.num_conflicts)
        cells = (*(f"{count:,}" for count in counts), mean, *(f"{count:,}" for count in repeats))
        table.append((name, *cells, f"{one.longer_wins:.1%}" if one.num_kept else "-"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    room = min(widths[0], WIDTH - sum(width + 2 for width in widths[1:]))
    return [
        f"{_end_of(name, room):<{room}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for name, *cells in table
    ]


def section(figures: Figures) -> list[str]:
    """The lines of one source."""
    lines = [figures.name, *_rows(figures)]
    if figures.lengths:
        lines += _lengths(figures)
    if figures.num_kept:
        lines += [*_texts(figures), *_preferences(figures), *_repeats(figures)]
    for warning in warnings(figures):
        lines += textwrap.wrap(
            warning,
            WIDTH,
            initial_indent="  ! ",
            subsequent_indent="    ",
            break_on_hyphens=False,
            break_long_words=False,  # a path in two lines cannot be copied
        )
    return lines


def warnings(figures: Figures) -> list[str]:
    """What deserves attention, each with what to do."""
    found = []
    num_refused = sum(figures.refused.values())
    if num_refused > MANY_REFUSED * figures.num_rows:
        found.append(
            f"{_share(num_refused, figures.num_rows)} of the rows are refused: training ends above "
            f"`max_bad_row_fraction` (default {MANY_REFUSED:g}). Correct the rows, or raise it."
        )
    if len(figures.forms) > 1:
        found.append(
            f"The rows are of several text forms ({', '.join(figures.forms)}): a run takes one. Convert them "
            "to one form, or train on one part."
        )
    if figures.num_dropped > MANY_DROPPED * figures.num_accepted:
        found.append(
            f"{_share(figures.num_dropped, figures.num_accepted)} of the rows are left out at `max_length` "
            f"{figures.max_length:,}, and with them what long texts would teach. Set max_length="
            f"{figures.max_length_for_99_percent} to keep 99%, {figures.max_length_for_all} to keep all."
        )
    if 0 < figures.num_without_prompt < figures.num_kept:
        found.append(
            f"{_number(figures.num_without_prompt, 'row')} of {figures.num_kept:,} have no prompt (absent, "
            "null or empty): they are trained on without a question, unless both sides begin with "
            "it. Fill it in, or drop them."
        )
    found += _about_labels(figures)
    if figures.num_conflicts:
        found.append(
            f"{_number(figures.num_conflicts, 'pair')} of texts preferred both ways, in "
            f"{figures.num_conflicting:,} rows: no model can learn both. Decide for one way, or drop them. "
            f"For example {_both(figures.conflict)}."
        )
    if figures.num_duplicates:
        found.append(
            f"{_number(figures.num_duplicates, 'repeated row')} "
            f"({_share(figures.num_duplicates, figures.num_kept)}), trained on as often as they stand there. "
            f"Drop them, unless that is meant. For example {_both(figures.duplicate)}."
        )
    found += _about_length(figures)
    for name, count in figures.prompts_in_common.items():
        found.append(
            f"{count:,} of its prompts are in {name} too. Where one of the two is for evaluation, set "
            "`data.exclude_prompts_of` to it, or accuracy will flatter."
        )
    return found


def _about_labels(figures: Figures) -> list[str]:
    """What a run refuses as it is set by itself."""
    found = []
    if figures.num_all_tied:
        found.append(
            f"{_number(figures.num_all_tied, 'row')} of which nothing is better or worse: a run refuses "
            "them, unless `tie_model` is set (davidson or rao-kupper)."
        )
    if figures.num_scored:
        found.append(
            f"{_number(figures.num_scored, 'row')} with scores in the place of better and worse: a run "
            "refuses them, unless `pointwise_loss` is set (mse, or bce for scores from 0 to 1)."
        )
    named = ", ".join(f'"{name}"' for name in figures.attributes)
    if figures.num_only_rated:
        found.append(
            f"{_number(figures.num_only_rated, 'row')} with ratings in the place of better and worse: a run "
            f"refuses them, unless `attributes` is set (attributes=[{named}])."
        )
    if figures.num_unread:
        found.append(
            f"{_number(figures.num_unread, 'row')} with ratings by attribute that cannot be read: a run that "
            f"sets `attributes` refuses them, another leaves the ratings out. The first: {figures.unread}"
        )
    return found


def _about_length(figures: Figures) -> list[str]:
    word, share = max(
        ("longer", figures.better_is_longer), ("shorter", figures.better_is_shorter), key=lambda one: one[1]
    )
    if share <= MUCH_LONGER:
        return []
    rule = max(figures.longer_wins, 1 - figures.longer_wins)
    return [
        f"The better text is the {word} one in {share:.0%} of comparisons: a model can be right by length "
        f"alone. Compare its accuracy with {rule:.1%}, not with 50%, or balance the lengths."
    ]


def _rows(figures: Figures) -> list[str]:
    lines = [_line("rows", f"{figures.num_rows:,} read, {figures.num_accepted:,} accepted")]
    for reason, count in figures.refused.items():
        lines += _wrapped("  refused", f"{reason} {count:,}, first: {figures.examples[reason]}")
    if len(figures.forms):
        named = ", ".join(f"{form} {count:,}" for form, count in figures.forms.items())
        lines.append(_line("text form", named))
    return lines


def _lengths(figures: Figures) -> list[str]:
    lines = []
    if figures.max_length is not None:
        dropped = f"{figures.num_dropped:,} rows ({_share(figures.num_dropped, figures.num_accepted)})"
        fit = f"99% of rows fit {figures.max_length_for_99_percent:,}, all fit {figures.max_length_for_all:,}"
        lines.append(_line(f"above {figures.max_length:,}", f"{dropped} are left out; {fit} tokens"))
    named = ", ".join(f"{name} {value:,.0f}" for name, value in figures.lengths.items())
    lines.append(_line("tokens of a text", f"{named} (prompt included)"))
    total = sum(count for _, _, count in figures.histogram)
    most = max(count for _, _, count in figures.histogram)
    first = next(place for place, (_, _, count) in enumerate(figures.histogram) if count)
    for low, high, count in figures.histogram[first:]:
        label = f"{low:,} or more" if high is None else f"{low:,}-{high:,}"
        # Whatever is there is seen.
        bar = "#" * max(round(_BAR * count / most), int(count > 0))
        lines.append(f"{label:>{_LABEL}}  {bar:<{_BAR}} {count:>11,} {_share(count, total):>6}")
    return lines


def _texts(figures: Figures) -> list[str]:
    unshared, once = figures.tokens_unshared, figures.tokens_prompts_once
    in_rows = figures.tokens_shared_in_rows
    return [
        _line(
            "rows kept",
            f"{figures.num_kept:,} with {figures.num_completions:,} texts; all that follows is of these",
        ),
        _line(
            "tokens an epoch", f"{unshared:,} where nothing is shared, as TRL computes them (plus padding)"
        ),
        _line("", f"{in_rows:,} with what a row's texts share once ({1 - in_rows / unshared:.0%} less)"),
        _line("", f"about {once:,} where all rows of a prompt meet ({1 - once / unshared:.0%} less)"),
        _line(
            "prompts",
            f"{figures.num_prompts:,} distinct, {figures.num_kept / figures.num_prompts:.2f} rows each, at "
            f"most {figures.most_rows_of_a_prompt:,}",
        ),
    ]


def _preferences(figures: Figures) -> list[str]:
    if not figures.num_comparisons:
        return _labels(figures)
    longer, shorter = figures.better_is_longer, figures.better_is_shorter
    equal = max(1 - longer - shorter, 0.0)
    lines = [
        _line(
            "label balance",
            f"the better text is longer in {longer:.1%}, shorter in {shorter:.1%}, as long in {equal:.1%};",
        ),
        _line("", f'the rule "longer wins" is right in {figures.longer_wins:.1%}'),
    ]
    if figures.num_rankings or list(figures.completions_per_row) != [2]:
        sizes = ", ".join(f"{count:,} rows of {size}" for size, count in figures.completions_per_row.items())
        lines.append(_line("completions", f"{sizes}; {figures.num_comparisons:,} comparisons"))
    if figures.num_rankings:
        places = ", ".join(f"{place + 1}: {share:.0%}" for place, share in figures.best_position.items())
        counts = f"{figures.num_rankings:,}, {figures.num_tied:,} with ties"
        lines.append(_line("rankings", f"{counts}; the best stands at place {places}"))
    if figures.num_margins:
        named = ", ".join(f"{name} {value:.3g}" for name, value in figures.margins.items())
        lines.append(_line("margins", f"{figures.num_margins:,} rows have one that is not 0: {named}"))
    return lines + _labels(figures)


def _labels(figures: Figures) -> list[str]:
    """What rows say beside which completion is better."""
    lines = []
    if figures.num_soft:
        named = ", ".join(f"{name} {value:.3g}" for name, value in figures.targets.items())
        lines.append(_line("soft labels", f"{figures.num_soft:,} rows have a target that is not 1: {named}"))
    if figures.num_all_tied:
        lines.append(_line("ties", f"{_number(figures.num_all_tied, 'row')} with nothing better or worse"))
    if figures.num_scored:
        named = ", ".join(f"{name} {value:.3g}" for name, value in figures.scores.items())
        lines.append(_line("scores", f"of the texts of {figures.num_scored:,} rows: {named}"))
    for place, (name, found) in enumerate(figures.attributes.items()):
        named = ", ".join(f"{key} {value:.3g}" for key, value in found.items() if key != "count")
        label = "" if place else "ratings"
        lines.append(_line(label, f"by {name}: of {_number(int(found['count']), 'text')}, {named}"))
    return lines


def _repeats(figures: Figures) -> list[str]:
    repeats, conflicts = _number(figures.num_duplicates, "row"), _number(figures.num_conflicts, "pair")
    return [
        _line("repeats", f"{repeats} with the texts and ranks of an earlier one"),
        _line("conflicts", f"{conflicts} of texts preferred both ways"),
    ]


def _line(label: str, said: str) -> str:
    """A label and what is said of it, cut at the page's width."""
    text = f"  {label:<{_LABEL - 2}}  {' '.join(said.split())}"
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _wrapped(label: str, said: str) -> list[str]:
    """A label and all that is said of it, in as many lines as it takes."""
    begin = f"  {label:<{_LABEL - 2}}  "
    return textwrap.wrap(
        " ".join(said.split()),
        WIDTH,
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        break_on_hyphens=False,
        break_long_words=False,
    )


def _end_of(name: str, room: int) -> str:
    return name if len(name) <= room else "..." + name[3 - room :]


def _both(places: tuple[str, str] | None) -> str:
    return " and ".join(places or ())


def _share(count: float, of: float) -> str:
    return f"{count / of:.1%}" if of else "0%"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
