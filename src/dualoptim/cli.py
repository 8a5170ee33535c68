"""The command line: dualoptim quickstart | unlearn | compare | tune | evaluate | plan | report | ls | init | ….

Settings come from defaults < recipe < command line. A user's mistake is reported in one sentence, with exit status 2.
Heavy modules are imported by the commands that need them, so that help is there at once.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from . import __version__, ranks
from .cache import cache_dir
from .command_line import arguments, catalog, rerun, streams, usage
from .command_line.arguments import COMMANDS, EVALUATION_FIELDS, INIT_FIELDS, PLAN_FIELDS, config_of, given_of
from .command_line.recipe_files import find_recipe, recipes_folder
from .config import ALONE, GOALS_OWN, METHODS, OF_METHODS, USES, RunConfig
from .errors import NotFiniteError, UserError, one_line, unknown
from .folder import RECIPE, RESULTS, check_new

SHARED = ("quickstart", "unlearn", "compare", "evaluate")  # commands that several ranks do together


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, as one of several ranks if a launcher started several; the exit status.

    0 done, 1 a record that does not hold, 2 a user's mistake, 3 a model that is not finite, 130 interrupted.
    """
    with streams.kept():
        status = _main(list(sys.argv[1:] if argv is None else argv))
        ranks.leave(status)
    return status


def _main(argv: Sequence[str]) -> int:
    try:
        ranks.join()
        if not argv or argv[0] in ("-h", "--help"):
            _print_help()
            return 0
        if argv[0] == "--version":
            print(f"dualoptim {__version__}")
            return 0
        if argv[0] == "--print-completion":
            print(usage.completion(argv[1] if len(argv) > 1 else "bash", COMMANDS, arguments.parsers()))
            return 0
        if argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        name, rest = argv[0], list(argv[1:])
        if "-h" in rest or "--help" in rest:
            arguments.parser(name).print_help()
            return 0
        parsed = arguments.parse(arguments.parser(name), rest)
        # One line, without the file and source line that warnings.warn adds.
        warnings.formatwarning = lambda message, *_, **__: f"dualoptim: warning: {message}\n"
        return _run(name, parsed) if name in SHARED else ranks.of_first(lambda: _run(name, parsed))
    except UserError as error:
        ranks.say(f"dualoptim: error: {error}")
        return error.status
    except OSError as error:  # a full disk, a file that was taken away
        where = f" ({error.filename})" if error.filename else ""
        ranks.say(one_line(f"dualoptim: error: {error.strerror or error}{where}"))
        return 2
    except (MemoryError, RuntimeError) as error:
        # What torch and Python also say where threads or their buffers do not fit.
        told = ("memory", "can't start new thread", "could not create a primitive")
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in told)):
            if not ranks.several():
                raise
            if not ranks.is_consequence():
                ranks.say(traceback.format_exc())
            return 1
        ranks.say("dualoptim: error: there was not enough memory; use a smaller batch or model")
        return 2
    except KeyboardInterrupt:
        ranks.say("dualoptim: stopped")
        return 130
    except Exception:
        if not ranks.several():
            raise
        ranks.say(traceback.format_exc())
        return 1


def _print_help() -> None:
    print(
        "usage: dualoptim COMMAND [options]\n\nMake a language model forget something and keep the rest.\n\ncommands:"
    )
    for name, what in COMMANDS.items():
        print(f"  {name:<11} {what}")
    print(
        "\n`dualoptim COMMAND --help` lists a command's options, with an example.\n"
        "`dualoptim --print-completion bash` writes a script for completion in a shell; also zsh and tcsh.\n"
        "`dualoptim --version` tells which version this is."
    )


def _suit_the_process() -> None:
    """Set what makes training on a CPU faster, as measured in docs/log.md, and a home; called before torch is loaded.

    By default, a thread that waits for another spins for long. Where other programs use the same cores, this takes the
    time that the other thread needs. Also, glibc returns large freed blocks to the kernel, though the next step needs
    as many again. Without GNU's OpenMP and C library, these settings have no effect.

    A user without a home has the cache's folder for it, if that is given: nltk is not imported without one.
    """
    if os.path.expanduser("~") == "~" and (given := os.environ.get("DUALOPTIM_CACHE")):
        os.environ["HOME"] = given
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)


def _run(name: str, parsed: Namespace) -> int:
    _suit_the_process()
    if name in SHARED:
        ranks.check_launcher()
    if name in (*SHARED, "tune"):
        cache_dir()  # told now, and not once the model is scored
    if name == "verify":
        return _verify(parsed)
    if name in ("unlearn", "compare"):
        _unlearn(name, parsed)
    else:
        {"quickstart": _quickstart, "evaluate": _evaluate, "plan": _plan, "report": _report, "ls": _ls, "env": _env,
         "init": _init, "certify": _certify, "tune": _tune}[name](parsed)  # fmt: skip
    return 0


def _quickstart(parsed: Namespace) -> None:
    told = ["--recipe", "quickstart", f"--seed={parsed.seed}", "--overwrite" if parsed.overwrite else "--resume"]
    told += [f"--{key}={value}" for key in ("model", "out") if (value := getattr(parsed, key)) is not None]
    if parsed.dry_run:
        told.append("--dry-run")
    _unlearn("compare", arguments.parse(arguments.parser("compare"), told))
    if not parsed.dry_run:
        own = rerun.options({"model": parsed.model or "smollm2", "forget": "my.jsonl", "retain": "keep.jsonl"})
        print(f"Your own rows: dualoptim unlearn {' '.join(own)}")


def _unlearn(name: str, parsed: Namespace) -> None:
    from . import grid, resolve, unlearn
    from .command_line import dry_run

    given = given_of(parsed)
    if name == "unlearn":
        configs = [config_of(parsed)]
    else:
        configs = grid.crossed(given, parsed.methods, parsed.seeds, parsed.grid)
    config = configs[0]
    resolve.check_read(configs)
    inputs = _inputs(parsed)
    if name == "compare" and (parsed.grid or parsed.shard or config.fast):
        _compare_many(configs, parsed, inputs)
        return
    push = _push(parsed, config) if name == "unlearn" else None
    if parsed.dry_run:
        dry_run.show(configs, resume=_may_be_there(parsed), overwrite=parsed.overwrite, inputs=inputs)
        return
    if config.forget is not None:
        _print_chosen(config, [*given, *(OF_METHODS if name == "compare" else ())])
    results = unlearn.run(configs, config.out, resume=parsed.resume, overwrite=parsed.overwrite, inputs=inputs)
    _tell(results, config)
    if push is not None:
        from . import publish

        print(f"Uploaded: {publish.push(push, config.out)}")


def _inputs(parsed: Namespace) -> dict[str, str | None]:
    """What is read beside what the settings name."""
    return {"recipe": str(find_recipe(parsed.recipe)) if parsed.recipe else None}


def _may_be_there(parsed: Namespace) -> bool:
    """Whether a dry run takes a folder that holds a run, as one with --resume does; it writes nothing there."""
    return parsed.resume or not parsed.overwrite


def _push(parsed: Namespace, config: RunConfig) -> Any:
    """Where to upload the model at the end, checked before anything slow starts; None for nowhere."""
    if parsed.push_to_hub is None:
        if given := {"push_public", "push_adapter"} & set(parsed.given):
            raise UserError(f"{sorted(given)[0]} says how a model is uploaded; add --push-to-hub REPO, or leave it out")
        return None
    from . import publish

    push = publish.Push(parsed.push_to_hub, parsed.push_public, parsed.push_adapter)
    publish.check(push, config)
    return push


def _compare_many(configs: Sequence[RunConfig], parsed: Namespace, inputs: dict[str, str | None]) -> None:
    """A grid of runs, or a part of them."""
    from . import grid
    from .command_line import dry_run

    shard = grid.Shard.read(parsed.shard) if parsed.shard is not None else None
    how: dict[str, Any] = {"shard": shard, "overwrite": parsed.overwrite, "inputs": inputs}
    if parsed.dry_run:
        every = list(grid.checked(configs, configs[0].out, resume=_may_be_there(parsed), **how).values())
        dry_run.show_resolved(every[:1])
        mine = len(every) if shard is None else len(range(shard.number - 1, len(every), shard.of))
        print(f"\n{len(every)} runs{f', {mine} of them here' if shard else ''}; the first is shown")
        return
    _tell(grid.run(configs, configs[0].out, grid=parsed.grid, resume=parsed.resume, **how), configs[0])


def _tune(parsed: Namespace) -> None:
    from . import report, tune
    from .command_line import dry_run

    search = tune.planned(
        {"out": parsed.out, **given_of(parsed)},
        parsed.space,
        trials=parsed.trials,
        minutes=parsed.minutes,
        tune_on=parsed.tune_on,
    )
    inputs = _inputs(parsed)
    if parsed.dry_run:
        how = {"resume": _may_be_there(parsed), "overwrite": parsed.overwrite, "inputs": inputs}
        tune.checked(search, **how)
        dry_run.show(list(search.trials_of.values())[:1], **how)
        print(f"\n── search ──\n{search}; the first trial of {next(iter(search.trials_of))} is shown")
        return
    results = tune.run(search, resume=parsed.resume, overwrite=parsed.overwrite, inputs=inputs)
    report.terminal(results)
    print(f"\nThe page: {Path(search.config.out) / 'report.html'}")
    (recipe,) = rerun.options({"recipe": str(Path(search.config.out) / RECIPE)})
    print(f"The recipe: dualoptim unlearn {recipe}")


def _tell(results: dict[str, Any], config: RunConfig) -> None:
    """Print the results of runs, and where their page is."""
    from . import report

    report.terminal(results)
    print(f"\nThe page: {Path(config.out) / 'report.html'}")
    if broken := [entry["method"] for entry in results["runs"] if not entry.get("finite", True)]:
        raise NotFiniteError(
            f"{', '.join(broken)}: the model's numbers are not finite after training; lower the learning rate, or "
            "take a loss that has a bound, such as NPO in place of GA"
        )


def _print_chosen(config: RunConfig, given: Sequence[str]) -> None:
    """Print what the goal chose, as options that would set the same."""
    settings = config.as_dict()
    chosen = rerun.options({key: settings[key] for key in GOALS_OWN if key not in given})
    if chosen:
        print(f"Chosen for --goal {config.goal}: {' '.join(chosen)}", flush=True)


def _evaluate(parsed: Namespace) -> None:
    from . import runs, unlearn
    from .evaluation import general

    if parsed.from_records:
        _evaluate_records(parsed)
        return
    config = RunConfig(**{key: getattr(parsed, key) for key in EVALUATION_FIELDS})
    if parsed.scores:
        check_new("scores", Path(parsed.scores))
    task, models, gold, scored_in = unlearn.evaluate(config, parsed.base)
    scores: dict[str, Any] = {"task": config.task or "files", "model": config.model, "scored_in": scored_in}

    secrets = runs.texts_of(task) if config.private else None

    def kept(records: Any) -> Any:
        return [runs.hashed(record) for record in records] if config.private else records

    for when, records in models.items():
        numbers, missing = general.scored(task, records, gold)[0]
        scores[when] = {"numbers": numbers, "missing": runs.redacted(secrets, missing), "records": kept(records)}
    scores["retrained"] = {"records": kept(gold)} if gold else None
    _print_numbers(task, models.get("before"), models["after"], gold)  # first: the disk may be full
    if parsed.scores:
        runs.write_json(Path(parsed.scores), scores)
        print(f"Every sample: {parsed.scores}")


def _evaluate_records(parsed: Namespace) -> None:
    from . import runs, tasks

    defaults = RunConfig().as_dict()
    unused = [key for key in (*EVALUATION_FIELDS, "base", "scores") if getattr(parsed, key) != defaults.get(key)]
    if unused:
        raise UserError(f"--from-records reads what a run left and nothing else; leave out {', '.join(unused)}")
    config, records = runs.read_records(parsed.from_records)
    try:
        task = tasks.task_of(config, records["after"])
        _print_numbers(task, records.get("before"), records["after"], records.get("retrained"))
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{parsed.from_records}: its records are not such as the task {config.get('task') or 'files'!r} makes "
            f"({type(error).__name__}: {error}); score the model again"
        ) from None


def _print_numbers(task: Any, before: Any, after: Any, retrained: Any) -> None:
    """Print a line for each number, with its value before, and the reason if it is missing."""
    from . import report
    from .evaluation import general

    now, metrics = general.scored(task, after, retrained)
    was = general.scored(task, before, retrained)[0] if before else None
    group = ""
    tables = list(dict.fromkeys(["", *(metric.group for metric in metrics.values())]))
    for key, metric in sorted(metrics.items(), key=lambda item: tables.index(item[1].group)):
        if metric.group != group:
            group = metric.group
            print(f"\n{group}")
        shown = f"{report.text(was.numbers[key], metric.format):>8} →" if was else ""
        value = now.numbers[key]
        print(
            f"{metric.label:<28}{shown} "
            + (f"not computed: {now.missing[key]}" if value is None else f"{report.text(value, metric.format):>8}")
        )


def _plan(parsed: Namespace) -> None:
    from . import plan

    plan.show(RunConfig(**{name: getattr(parsed, name) for name in PLAN_FIELDS}), parsed.devices, parsed.device_memory)


def _report(parsed: Namespace) -> None:
    from . import report, runs

    several = [runs.read_results(run) for run in parsed.runs]
    folders = [path if path.is_dir() else path.parent for path in map(Path, parsed.runs)]
    together = Path(os.path.relpath(os.path.commonpath([folder.absolute() for folder in folders])))
    if len(several) > 1 and not parsed.out and (together / RESULTS).exists():
        raise UserError(f"report: {together} has a page of its own; give --out FILE.html for this one")
    out = Path(parsed.out) if parsed.out else (together if len(several) > 1 else folders[0]) / "report.html"
    report.check_file(out)
    report.write(several[0], out, *several[1:])
    for results in several:
        report.terminal(results)
    print(f"\nThe page: {out}")


def _ls(parsed: Namespace) -> None:
    print("recipes (--recipe NAME)")
    for path in sorted(recipes_folder().glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"  {path.stem:<26} {first}")
    print("\ntasks (--task NAME, or a file of your own)")
    for name, what in catalog.tasks().items():
        print(f"  {name:<20} {what}")
    for role in ("forget", "retain"):
        print(f"\nlosses to {role} (--{role}-loss NAME)")
        for name, entry in catalog.losses().items():
            if entry.role == role:
                print(f"  {name:<20} {entry.formula}")
                if entry.use:
                    print(f"  {'':<20} {entry.use}")
    print("\nmethods (--methods, or --optimizer and --joint)")
    for name in (*METHODS, ALONE):
        bits = f"when memory is short: {name.removesuffix(' 8-bit')} with states in 8 bits" * name.endswith(" 8-bit")
        print(f"  {name:<26} {f'Use it {use}.' if (use := USES.get(name, bits)) else ''}".rstrip())


def _init(parsed: Namespace) -> None:
    from .command_line import starter

    out = Path(parsed.out)
    check_new("init", out)
    given = {key: value for key in INIT_FIELDS if (value := getattr(parsed, key)) is not None}
    starter.write({**given, "out": f"runs/{out.stem}"}, out)
    print(
        f"{one_line(out)}: written. Check it by: dualoptim unlearn {rerun.options({'config': str(out)})[0]} --dry-run"
    )


def _env(parsed: Namespace) -> None:
    from . import runs

    print(yaml.safe_dump(runs.environment(), sort_keys=False, allow_unicode=True), end="")


def _certify(parsed: Namespace) -> None:
    from .certify import certificate, signing

    if parsed.key is None:
        raise UserError(f"certify: give --key FILE, your Ed25519 private key; {signing.MAKE} makes one")
    said, path = certificate.certify(
        parsed.folder,
        parsed.key,
        out=parsed.out,
        number=parsed.run,
        method=parsed.method,
        seed=parsed.seed,
        before=parsed.before,
        passphrase_file=parsed.passphrase_file,
    )
    print(f"{os.path.relpath(path)}: signed by the key {said['signer']['fingerprint']}")
    _print_limits(said)


def _verify(parsed: Namespace) -> int:
    """Print a line for each thing that was checked; the exit status."""
    from .certify import certificate

    checks = certificate.verify(
        parsed.record,
        public_key=parsed.public_key,
        run=parsed.run,
        model=parsed.model,
        before=parsed.before,
        forget=parsed.forget,
        retain=parsed.retain,
    )
    for item, state, detail in checks:
        print(one_line(f"{state:<9}  {item}{f': {detail}' if detail else ''}"))
    states = [check.state for check in checks]
    count = {state: states.count(state) for state in (certificate.OK, certificate.DIFFERS, certificate.NOT_THERE)}
    print(f"\n{', '.join(f'{number} {state}' for state, number in count.items())}")
    if checks[0].state == certificate.OK:
        said = certificate.read(parsed.record)
        _print_limits(said)
        if parsed.show:
            print(json.dumps(said, indent=1))
    return int(certificate.DIFFERS in states)


def _print_limits(said: dict[str, Any]) -> None:
    """Print what a record does not say."""
    for remark in said["remarks"]:
        print(one_line(f"· {remark}"))
    missing = said["not_measured"]
    attacks = ", ".join(missing["attacks"]) or "none"
    print(one_line(f"Not measured: {len(missing['numbers'])} numbers; attacks: {attacks}"))
    print(one_line(said["statement"]))
