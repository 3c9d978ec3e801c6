"""`rayrm`: train, evaluate, score, publish, serve, sweep, report, demo, config, data, doctor, from the shell.

Each command parses its words and calls one function of the package; torch and ray are imported by the command
that needs them, so that `rayrm config` is instant. What the user can mend ends with one message and exit
status 2, a run that failed with 1, one that SIGTERM made leave with 75, Ctrl-C with 130; `--debug` adds the
stack trace.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayrm.errors import PreemptedError, RayrmError
from rayrm.evaluate_command import add_evaluate
from rayrm.inspect_command import add_data
from rayrm.report_command import add_report
from rayrm.rl.ending import ON_SIGTERM
from rayrm.rl_commands import add_refresh, add_rl
from rayrm.runfile import split_words
from rayrm.score_command import add_score
from rayrm.serve_commands import (
    add_publish,
    add_roll,
    add_serve,
    add_status,
)
from rayrm.sweep_command import add_sweep

_OVERRIDES = "settings such as learning_rate=2e-6 or cluster.num_workers=8, over those of the run file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no `key=value` word after an option once it has seen the first of them, or none.
    words: list[str] | None = getattr(options, "settings", getattr(options, "run", None))
    settings = all("=" in word and not word.startswith("-") for word in rest)
    if rest and (words is None or not settings):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:
        words.extend(rest)
    _take_ray_token()
    try:
        status: int = options.command(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\nrayrm: interrupted", file=sys.stderr)
        return 130
    except SystemExit as ended:
        if ended.code == ON_SIGTERM:
            print("\nrayrm: ended by SIGTERM", file=sys.stderr)
        raise
    except BrokenPipeError:
        # The reader of our output (`| head`) has seen enough. Python must not flush into it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PreemptedError as left:
        print(f"rayrm: {left}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except (RayrmError, ModuleNotFoundError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"rayrm: error: {_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _take_ray_token() -> None:
    """Join clusters by this machine's token, if it has one: `ray start` does so itself, a client does not."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if token.is_file() and "ray" not in sys.modules:  # ray reads the mode once, when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and not isinstance(error, RayrmError):
        package = (error.name or "").partition(".")[0]
        return f"the package {package!r} is not installed. Type: pip install {package}"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rayrm", description="Reward models, trained and served on Ray.")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show stack traces")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what, parents=[shared])
        added.set_defaults(command=run)
        return added

    train = command("train", _train, "Train the run of a run file; goes on where it was cut off.")
    _add_run(train)
    add_evaluate(command("evaluate", None, "How good a model is on preference pairs, set by set."))
    add_score(command("score", None, "Score files of completions; write all rows, the best ones, or pairs."))
    add_publish(command("publish", None, "Copy a trained model into a registry, as an immutable version."))
    add_serve(command("serve", None, "Serve a model on Ray until Ctrl-C."))
    add_roll(command("roll", None, "Let a running service serve another version, without losing a request."))
    add_status(command("status", None, "What a running service serves, and how its replicas stand."))
    add_rl(command("rl", None, "Train a policy by GRPO or RLOO against the reward service."))
    add_refresh(command("refresh", None, "Train the served model on, on a judge's rankings of the samples."))
    add_sweep(command("sweep", None, "Train a run file's run with several settings, and name the best."))
    add_report(command("report", None, "Pages of training runs and evaluations, or of several compared."))
    demo = command("demo", _demo, "The whole way once: data, training, evaluation, serving, GRPO.")
    demo.add_argument("--out", default="demo-out", help="default: demo-out")
    demo.add_argument("--steps", type=int, help="cut training short")
    config = command(
        "config",
        _config,
        "Print the run that a run file (of a run, sweep, RL run or refresh) and overrides make.",
    )
    _add_run(config)
    add_data(commands.add_parser("data", help="Look at preference data: `rayrm data inspect`."), shared)
    doctor = command("doctor", _doctor, "Look at this machine, and say what to mend.")
    doctor.add_argument("--ray", action="store_true", help="also start (or join) Ray and run a task")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="*", metavar="run.toml key=value", help=f"a run file, then {_OVERRIDES}")


def _train(options: argparse.Namespace) -> int:
    from rayrm.runfile import read_run

    run = read_run(*split_words(options.run))  # before the seconds that torch and ray take to import
    from rayrm.train.launch import train_run

    def finish(directory: Path) -> None:
        from rayrm.report.card import illustrate_card
        from rayrm.report.run import write_run_report

        illustrate_card(directory)
        print(f"report: {write_run_report(directory)}")

    summary = train_run(run, finish=finish)
    seen = {key: value for key, value in summary.metrics.items() if key.endswith(("loss", "accuracy"))}
    shown = ", ".join(f"{key} {value:.4g}" for key, value in seen.items())
    print(f"trained {summary.num_steps} steps ({shown}); the model is in {summary.output_dir}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from rayrm.demo.story import main as tell

    return tell(options.out, steps=options.steps)


def _config(options: argparse.Namespace) -> int:
    from rayrm.runfile import dump_run, read_run, sections_of

    path, words = split_words(options.run)
    sections = sections_of(path)
    if sections & {"policy", "prompts", "rl"}:
        from rayrm.rl.runfile import dump_rl_run, read_rl_run

        print(dump_rl_run(read_rl_run(path, words)), end="")
    elif "refresh" in sections:
        from rayrm.rl.refresh_settings import dump_refresh, read_refresh

        print(dump_refresh(read_refresh(path, words)), end="")
    elif "sweep" in sections or any(word.startswith("sweep.") for word in words):
        from rayrm.sweep_settings import dump_sweep, read_sweep

        print(dump_sweep(*read_sweep(path, words).read()), end="")
    else:
        print(dump_run(read_run(path, words)), end="")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from rayrm.doctor import print_doctor

    return print_doctor(start_ray=options.ray)


if __name__ == "__main__":
    sys.exit(main())
