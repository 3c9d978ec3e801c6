"""`rayrm rl`: a policy trained by GRPO or RLOO against the reward service, from the shell."""

from __future__ import annotations

import argparse


def add_rl(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_rl)
    parser.add_argument(
        "run",
        nargs="*",
        metavar="run.toml key=value",
        help="an RL run file, then settings such as max_steps=100 or cluster.num_workers=2, over its own",
    )


def _rl(options: argparse.Namespace) -> int:
    from rayrm.report.rl import write_rl_report
    from rayrm.rl.launch import train_policy
    from rayrm.rl.runfile import read_rl_run
    from rayrm.runfile import split_words

    path, overrides = split_words(options.run)
    summary = train_policy(read_rl_run(path, overrides))
    print(f"policy: {summary.output_dir} ({len(summary.records)} steps logged)")
    if summary.gain is not None:
        gain = summary.gain
        print(
            f"held-out reward {gain.before:+.3f} -> {gain.after:+.3f}: gain {gain.gain:+.3f}, 95% interval "
            f"{gain.low:+.3f} to {gain.high:+.3f} ({gain.num_samples} samples of each policy, "
            f"{gain.num_prompts} prompts)"
        )
    print(f"report: {write_rl_report(summary.output_dir)}")
    return 0
