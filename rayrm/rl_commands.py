"""`rayrm rl` and `refresh`: a policy that learns from the reward service, and the service from the policy."""

from __future__ import annotations

import argparse
import contextlib
import time


def add_rl(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_rl)
    parser.add_argument(
        "run",
        nargs="*",
        metavar="run.toml key=value",
        help="an RL run file, then settings such as max_steps=100 or cluster.num_workers=2, over its own",
    )


def add_refresh(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_refresh)
    parser.add_argument(
        "run",
        nargs="*",
        metavar="refresh.toml key=value",
        help="a refresh file, then settings such as min_pairs=128 or reward.learning_rate=1e-5, over its own",
    )


def _refresh(options: argparse.Namespace) -> int:
    from rayrm.rl.refresh_settings import read_refresh
    from rayrm.runfile import split_words

    settings = read_refresh(*split_words(options.run))  # before the seconds that torch and ray take to import
    from rayrm.rl.refresh import refresh

    for outcome in refresh(settings):
        ended = f"serves {outcome.version}" if outcome.accepted else f"refused: {outcome.reason}"
        print(f"round {outcome.round}: {outcome.num_rows} rows on {outcome.base}, {ended}")
    return 0


def _rl(options: argparse.Namespace) -> int:
    from rayrm.rl.runfile import read_rl_run
    from rayrm.runfile import split_words

    run = read_rl_run(*split_words(options.run))
    from rayrm.errors import RunDirectoryError
    from rayrm.report.rl import write_rl_report
    from rayrm.rl.ending import ending_on_sigterm
    from rayrm.rl.launch import train_policy
    from rayrm.train.records import METRICS, read_records

    began = time.time()
    try:
        summary = train_policy(run, report=write_rl_report)
    except RunDirectoryError:
        raise  # what is there is another's
    except BaseException:
        log = run.output_dir / METRICS
        if log.exists() and log.stat().st_mtime >= began and read_records(run.output_dir):
            # It shows how far a run that was cut off came; what ended it is what is to be told.
            with contextlib.suppress(Exception), ending_on_sigterm():
                print(f"report: {write_rl_report(run.output_dir)}")
        raise
    with ending_on_sigterm():
        print(f"report: {write_rl_report(run.output_dir)}")
    print(f"policy: {summary.output_dir} ({len(summary.records)} steps logged)")
    if summary.gain is not None:
        gain = summary.gain
        print(
            f"held-out reward {gain.before:+.3f} -> {gain.after:+.3f}: gain {gain.gain:+.3f}, 95% interval "
            f"{gain.low:+.3f} to {gain.high:+.3f} ({gain.num_samples} samples of each policy, "
            f"{gain.num_prompts} prompts)"
        )
    return 0
