"""The command line: one thin function a command. Data goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 a bug, 2 usage, 3 invalid input, 4 environment unfit, 5 stopped by a breaker, 6 storage,
75 run folder in use, 130 and 143 interrupted. Heavy packages load inside the commands that need them.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option
from typer.exceptions import TyperException

from archsearch import __version__
from archsearch.commands.console import print_json, report_bug, report_error, show_log
from archsearch.errors import ArchsearchError, EnvironmentUnfit, UsageError

app = typer.Typer(
    name="archsearch",
    help="Search for hybrid language models that are accurate and decode fast on this machine.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunPath = Annotated[Path, Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
Arch = Annotated[str, Argument(metavar="ARCH", help="A YAML or JSON file, or a reference name.", show_default=False)]
Json = Annotated[bool, Option("--json", help="Print one JSON object.")]
Set = Annotated[list[str] | None, Option("--set", metavar="KEY.PATH=VALUE", help="Override a value; repeatable.")]
Tune = Annotated[bool, Option("--tune", help="First tune the training kernels on this GPU: minutes.")]
Replicates = Annotated[int | None, Option(help="Then train the front with so many other seeds.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    show_log()
    given = sys.argv[1:] if arguments is None else arguments
    words = [word for word in given if word != "--debug"]
    try:
        done = app(words or ["--help"], prog_name="archsearch", standalone_mode=False)
        return done if isinstance(done, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        if len(words) < len(given):
            traceback.print_exception(error)
        return _report(error)


def _report(error: BaseException) -> int:
    if isinstance(error, ArchsearchError):
        return report_error(error)
    if isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        remedy = f"see `{context.command_path if context else 'archsearch'} --help`"
        return report_error(UsageError(error.format_message(), remedy))
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130
    return report_bug(error)


def _version(asked: bool) -> None:
    if asked:
        print(f"archsearch {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; ``main`` reads --debug, wherever it stands."""


@app.command()
def run(
    space: Annotated[Path, Option(metavar="FILE", help="The search space and its settings.", show_default=False)],
    out: Annotated[Path | None, Option(metavar="DIR", help="A new folder; experiments/NAME-TIME if absent.")] = None,
    set_: Set = None,
    evaluations: Annotated[int | None, Option(help="Candidates to evaluate.")] = None,
    executor: Annotated[str | None, Option(help="ray or inline.")] = None,
    workers: Annotated[int | None, Option(help="Evaluations at the same time.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the search.")] = None,
    replicates: Replicates = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would run; write nothing.")] = False,
    json: Json = False,
) -> int:
    """Search a space."""
    from archsearch.commands.settings import as_overrides
    from archsearch.config import load_config

    flags = {
        "search.evaluations": evaluations,
        "execution.executor": executor,
        "execution.workers": workers,
        "search.seed": seed,
    }
    config = load_config(space, [*(set_ or ()), *as_overrides(flags)])
    if dry_run:
        from archsearch.commands.spaces import show_plan

        return show_plan(config, json=json)
    from archsearch.commands.search import start

    return start(config, out, replicates=replicates, json=json)


@app.command()
def resume(run: RunPath, replicates: Replicates = None, json: Json = False) -> int:
    """Go on with a run that was stopped, from what it had committed."""
    from archsearch.commands.search import go_on

    return go_on(run, replicates=replicates, json=json)


@app.command()
def inspect(
    run: RunPath,
    trial: Annotated[int | None, Option(help="Show one trial in full.")] = None,
    json: Json = False,
    csv: Annotated[bool, Option("--csv", help="Print all candidates as CSV.")] = False,
    why: Annotated[bool, Option("--why", help="Also what proposals earned and which genes matter.")] = False,
    noise: Annotated[Path | None, Option(metavar="DIR", help="Seed noise from a validate-proxy study.")] = None,
) -> None:
    """Show what a run found: its front, its outcomes, one trial."""
    from archsearch.commands.inspect import show

    if json and csv:
        raise UsageError("--json and --csv exclude each other", "give one of them")
    show(run, trial, json=json, csv=csv, why=why, noise=noise)


@app.command()
def export(
    run: RunPath,
    to: Annotated[Path, Option(help="A path that does not exist.", show_default=False)],
    trial: Annotated[int | None, Option(help="Its number; the one with the lowest loss if absent.")] = None,
    format: Annotated[str, Option(help="hf (Hugging Face folder), yaml or json.")] = "hf",
    json: Json = False,
) -> None:
    """Write a candidate as a model that transformers loads, or as a file."""
    from archsearch.commands.inspect import export_trial

    export_trial(run, trial, to, format, json=json)


@app.command()
def train(
    arch: Arch,
    space: Annotated[Path | None, Option(metavar="FILE", help="Take the proxy settings from this config.")] = None,
    set_: Set = None,
    seed: Annotated[int, Option(min=0, help="Seed of weights and data.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train one architecture's proxy."""
    from archsearch.architecture import load_architecture
    from archsearch.commands import single
    from archsearch.commands.settings import load_section
    from archsearch.config import ProxyConfig

    config = load_section("proxy", ProxyConfig, space, set_ or ())
    result = single.train(load_architecture(arch), config, seed=seed, device=device)
    print_json("train", result) if json else print(*single.train_lines(result), sep="\n")


@app.command()
def latency(
    arch: Arch,
    space: Annotated[Path | None, Option(metavar="FILE", help="Take the latency settings from this config.")] = None,
    set_: Set = None,
    device: Device = "auto",
    dtype: Annotated[str | None, Option(help="auto, bfloat16 or float32.")] = None,
    batch: Annotated[int | None, Option(help="Sequences at once.")] = None,
    tokens: Annotated[str | None, Option(help="Tokens to decode a sequence, such as 8192.")] = None,
    context: Annotated[int | None, Option(min=1, help="Tokens stored for the throughput; tokens if absent.")] = None,
    exact: Annotated[bool, Option("--exact", help="Also decode all tokens, in three fresh processes.")] = False,
    json: Json = False,
) -> None:
    """Measure one architecture: decode, prefill, throughput, memory and energy."""
    from archsearch.architecture import load_architecture
    from archsearch.commands import single
    from archsearch.commands.settings import as_overrides, load_section
    from archsearch.config import LatencyConfig

    flags = as_overrides({"latency.dtype": dtype, "latency.batch": batch, "latency.tokens": tokens})
    config = load_section("latency", LatencyConfig, space, [*(set_ or ()), *flags])
    result = single.measure(load_architecture(arch), config, device=device, context=context, exact=exact)
    print_json("latency", result) if json else print(*single.latency_lines(result), sep="\n")


@app.command()
def profile(
    space: Annotated[Path, Option(metavar="FILE", help="The search space and its settings.", show_default=False)],
    out: Annotated[Path | None, Option(metavar="FILE", help="latency_profiles/DEVICE-SPACE.json if absent.")] = None,
    check: Annotated[int, Option(help="Whole architectures to measure, half of them held out.")] = 24,
    set_: Set = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure the latency profile of this device: what each operator of a space costs."""
    from archsearch.commands.profile import start
    from archsearch.config import load_config

    start(load_config(space, set_ or ()), out, checks=check, device=device, json=json)


@app.command()
def data(
    source: Annotated[
        str | None, Argument(metavar="[SOURCE]", help="builtin:python, files:PATH, tokens:PATH or hf:OWNER/NAME.")
    ] = None,
    space: Annotated[Path | None, Option(metavar="FILE", help="Take proxy settings and vocabulary from here.")] = None,
    tokenizer: Annotated[str | None, Option(help="bytes, bpe, a tokenizer.json or a pretrained name.")] = None,
    vocab_size: Annotated[int | None, Option(min=2, help="Of the models; that of the space if absent.")] = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Tokenise a corpus into the cache ahead of a run, and describe it."""
    from archsearch.commands import data as corpora

    facts = corpora.prepare(source, space, tokenizer, vocab_size, set_ or ())
    print_json("data", facts) if json else print(*corpora.lines(facts), sep="\n")


@app.command()
def validate(
    file: Annotated[Path, Argument(metavar="FILE", help="A config or an architecture.", show_default=False)],
    json: Json = False,
) -> None:
    """Check a file without running anything."""
    from archsearch.commands.spaces import validate_file, validation_line

    facts = validate_file(file)
    if json:
        print_json("validate", facts)
    else:
        print(validation_line(facts))


@app.command()
def init(
    file: Annotated[Path, Argument(metavar="FILE", help="A new file.")] = Path("space.yaml"),
    json: Json = False,
) -> None:
    """Write a commented search space to start from."""
    from archsearch.commands.spaces import write_template

    write_template(file)
    print_json("init", {"path": str(file)}) if json else print(file)


@app.command()
def scaling(
    space: Annotated[Path, Option(metavar="FILE", help="The search space and its settings.", show_default=False)],
    depths: Annotated[str, Option(help="Numbers of blocks, such as 2,4,8,12.", show_default=False)],
    widths: Annotated[str, Option(help="Hidden sizes, such as 256,384,512,768.", show_default=False)],
    budgets: Annotated[str | None, Option(help="Training tokens, such as 5M,20M,80M; proxy.tokens if absent.")] = None,
    block: Annotated[str | None, Option(help="Operators of a block; the first stage's first if absent.")] = None,
    out: Annotated[Path | None, Option(metavar="DIR", help="A new folder, or that of an earlier start.")] = None,
    metric: Annotated[str, Option(help="What the law is fitted to: perplexity or nats.")] = "perplexity",
    latencies: Annotated[str | None, Option(help="Seconds to decode in, such as 0.5,1,2.")] = None,
    set_: Set = None,
    json: Json = False,
) -> int:
    """Train a grid of depths and widths, fit the scaling law, give the best size for each latency."""
    from archsearch.commands.scaling import start
    from archsearch.config import load_config

    return start(
        load_config(space, set_ or ()),
        out,
        depths=depths,
        widths=widths,
        budgets=budgets,
        block=block,
        metric=metric,
        latencies=latencies,
        json=json,
    )


@app.command("validate-proxy")
def validate_proxy(
    space: Annotated[Path, Option(metavar="FILE", help="The search space and its settings.", show_default=False)],
    architectures: Annotated[int, Option(help="How many to sample and train.", show_default=False)],
    long: Annotated[str, Option(help="Tokens of the long training, such as 200M.", show_default=False)],
    short: Annotated[str | None, Option(help="Tokens of the proxy; proxy.tokens if absent.")] = None,
    seeds: Annotated[int, Option(help="Short trainings an architecture; 2 or more tell the seed noise.")] = 2,
    correlation: Annotated[float, Option(help="That the shortest budget must keep.")] = 0.8,
    out: Annotated[Path | None, Option(metavar="DIR", help="A new folder, or that of an earlier start.")] = None,
    set_: Set = None,
    json: Json = False,
) -> int:
    """Train a sample short and long, and tell how far the proxy's ranking can be trusted."""
    from archsearch.commands.validity import start
    from archsearch.config import load_config

    return start(
        load_config(space, set_ or ()),
        out,
        architectures=architectures,
        long=long,
        short=short,
        seeds=seeds,
        correlation=correlation,
        json=json,
    )


@app.command()
def doctor(json: Json = False, tune: Tune = False) -> None:
    """Check this machine: packages, GPU, disk, Ray and every operator."""
    from archsearch.commands.doctor import run_checks
    from archsearch.commands.tables import print_checks

    if tune:
        from archsearch.commands.tuning import tune_kernels

        tune_kernels()
    checks = list(run_checks()) if json else print_checks(run_checks())
    failed = [check for check in checks if check.status == "fail"]
    if json:
        print_json("doctor", {"ok": not failed, "checks": [check.to_dict() for check in checks]})
    if failed:
        names = ", ".join(check.name for check in failed)
        raise EnvironmentUnfit(f"{len(failed)} of {len(checks)} checks failed: {names}", "follow the remedies above")


if __name__ == "__main__":
    sys.exit(main())
