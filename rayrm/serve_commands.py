"""`rayrm publish`, `serve`, `roll` and `status`: a trained model's way to its callers, from the shell."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayrm.errors import ConfigError, PublishError

MODEL = "a directory (a run's, a checkpoint, registry/NAME), or a name published in --registry"


def add_publish(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_publish)
    parser.add_argument("checkpoint", help="a run's directory, or its checkpoint-<step>")
    parser.add_argument("--name", default="reward", help="what the model is called there (reward)")
    parser.add_argument("--keep-adapter", action="store_true", help="do not merge a LoRA adapter")
    parser.add_argument(
        "--probe",
        metavar="FILE",
        help="jsonl of texts like those to be served (as for `score`): replicas must score the first 256 of "
        "them as now, and drift of scores is measured against them",
    )
    parser.add_argument(
        "--calibrate",
        metavar="NAME=FILE",
        action="append",
        default=[],
        help="jsonl of texts of one kind: mean and spread of their scores come with every answer, for "
        "rewards with `calibrate=NAME`; may be given several times",
    )
    parser.add_argument(
        "--gate",
        metavar="FILE",
        help="a TOML file of held-out sets and what the model must reach on them, else nothing is published",
    )
    parser.add_argument("--roll", metavar="SERVICE", help="then let this running service serve the version")
    parser.add_argument("--address", help="the Ray cluster of --roll")
    add_registry(parser)


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_serve)
    parser.add_argument("model", help=f"{MODEL}; several as `one=DIR,two=DIR`")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="fields of [serve]: num_replicas=2")
    parser.add_argument("--name", help="the service's name (reward)")
    parser.add_argument("--address", help="the Ray cluster")
    add_registry(parser)


def add_roll(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_roll)
    parser.add_argument("service", help="the running service's name")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--to",
        metavar="VERSION",
        help="published beside the one that serves, or a published model's directory",
    )
    where.add_argument("--back", action="store_true", help="to the version before the latest roll")
    parser.add_argument("--model", help="which of the service's models")
    parser.add_argument("--address", help="the Ray cluster")


def add_status(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_status)
    parser.add_argument("service", help="the running service's name")
    parser.add_argument("--address", help="the Ray cluster")


def add_registry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--registry", default="registry", help="directory of published models (registry)")


def model_directory(word: str, registry: str) -> str:
    """`word` itself, the current version of the published model that it is, or one in the registry."""
    from rayrm.serve.registry import CURRENT, open_published

    for place in (Path(word), Path(registry) / word):
        if (place / CURRENT).is_file():
            return str(open_published(place).path)
        if place.is_dir():
            return str(place)
    raise PublishError(
        f"model ({word!r}) is no directory, and nothing is published as {str(Path(registry) / word)!r}. Type "
        "the directory of a run, a checkpoint or a published model."
    )


def _publish(options: argparse.Namespace) -> int:
    from rayrm.serve.registry import check_published_name, publish

    if options.gate is not None:
        check_published_name(options.name)
        _pass_gate(options)
    published = publish(
        options.checkpoint,
        options.registry,
        options.name,
        merge_lora=not options.keep_adapter,
        # A service that refuses the version keeps its own, and the registry's current one with it.
        make_current=options.roll is None,
        probe=options.probe,
        calibrate=_named_files(options.calibrate),
    )
    was = "published" if published.is_new else "was already published"
    print(f"{published.name} {published.version} {was}: {published.path}")
    if options.roll is not None:
        client = _client(options.roll, options.address)
        # A service of several models is rolled in the one of this name.
        model = options.name if options.name in client.status()["models"] else None
        _print_roll(options.roll, client.roll(published.path, model=model))
    return 0


def _pass_gate(options: argparse.Namespace) -> None:
    """Measure the checkpoint and print each rule. Raises PublishError where one is broken."""
    from rayrm.evaluation.gate import broken_rules, check_gate
    from rayrm.evaluation.gate_settings import read_gate
    from rayrm.serve.registry import CURRENT, open_published

    gate = read_gate(options.gate)
    home = Path(options.registry) / options.name
    current = open_published(home).path if (home / CURRENT).is_file() else None
    checks = check_gate(options.checkpoint, gate, current)
    for check in checks:
        print(f"{'holds ' if check.holds else 'BROKEN'}  {check.said}")
    if broken := broken_rules(checks):
        raise PublishError(
            f"{options.checkpoint} does not pass {options.gate}: nothing was published. {broken}"
        )


def _named_files(words: Sequence[str]) -> dict[str, str]:
    """`NAME=FILE` words of --calibrate."""
    found: dict[str, str] = {}
    for word in words:
        name, _, file = word.partition("=")
        if not name or not file or name in found:
            raise ConfigError(f"--calibrate ({word!r}) must be NAME=FILE, each name once. Type: chat=FILE")
        found[name] = file
    return found


def _serve(options: argparse.Namespace) -> int:
    from rayrm.config import ServeConfig

    named = [f"name={options.name}"] if options.name else []
    words = [word.removeprefix("serve.").partition("=") for word in (*options.settings, *named)]
    if bad := next((key for key, equals, _ in words if not equals), None):
        raise ConfigError(f"setting `{bad}` must be key=value. Type for example `num_replicas=2`.")
    fields: dict[str, Any] = {key: value for key, _, value in words}
    settings = ServeConfig(**fields)
    model = _models(options.model, options.registry)
    from rayrm.serve.deployment import serve_forever

    serve_forever(model, settings, address=options.address)
    return 0


def _models(word: str, registry: str) -> str | dict[str, str]:
    """One model, or several as `one=DIR,two=DIR`."""
    if "=" not in word or Path(word).is_dir():
        return model_directory(word, registry)
    found: dict[str, str] = {}
    for pair in word.split(","):
        name, equals, place = pair.partition("=")
        if not equals or not name or name in found:
            raise ConfigError(f"model ({word!r}) must name each model once. Type: one=DIR,two=DIR")
        found[name] = model_directory(place, registry)
    return found


def _roll(options: argparse.Namespace) -> int:
    client = _client(options.service, options.address)
    if options.back:
        result = client.rollback(model=options.model)
    else:
        result = client.roll(options.to, model=options.model)
    _print_roll(options.service, result)
    return 0


def _print_roll(service: str, result: Any) -> None:
    if result.version == result.before:
        print(f"{service} serves {result.model} {result.version} already")
        return
    print(
        f"{service} serves {result.model} {result.version} on {result.num_replicas} replica(s) after "
        f"{result.seconds:.1f} s; before: {result.before} "
        f"(rayrm roll {service} --back --model {result.model})"
    )


def _status(options: argparse.Namespace) -> int:
    print(json.dumps(_client(options.service, options.address).status(), indent=2))
    return 0


def _client(service: str, address: str | None) -> Any:
    from rayrm.serve.client import RewardClient
    from rayrm.serve.connect import connect

    connect(address, start=False)
    return RewardClient(service)
