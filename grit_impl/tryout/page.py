"""The one page that answers, in Markdown: for the terminal, for a file, for a pull request."""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote
from typing import Any

from grit_impl.tryout.decision import ALPHA
from grit_impl.tryout.plan import GRIT, LORAPLUS_RATIO, NAMES, at_an_end

Result = Mapping[str, Any]
HEADS = {"yes": "Yes", "no": "No", "inconclusive": "Inconclusive"}


def markdown(result: Result) -> str:
    """The page of what `session.run` found.

    Args:
        result: The content of `answer.json`.
    """
    answer = result["answer"]
    lines = [
        f"# Does GRIT help on {result['dataset']}? {HEADS[answer['outcome']]}",
        "",
        f"**Did it matter?** {_mattered(result)}",
        "",
        f"**Did it help?** {_helped(result)}",
        "",
        f"**What did it cost?** {_cost(result)}",
        "",
        "**What next?** " + _next(result),
        "",
        *_commands(result),
        "",
        "## The pairs",
        "",
        *_pairs(result),
        "",
        "## The tuning",
        "",
        *_tuning(result),
        "",
        "## How this was decided",
        "",
        _rules(result),
        "",
    ]
    return "\n".join(lines)


def _mattered(result: Result) -> str:
    """The ledger's verdict on the first seed's run of GRIT."""
    ledger = result["ledger"]
    head = {True: "Yes", False: "No", None: "Undecided"}[ledger["effective"]]
    return f"{head}: {ledger['summary'].removeprefix(f'{head}: ')} ({ledger['cause']})."


def _helped(result: Result) -> str:
    answer, loss = result["answer"], result["metric"] == "loss"
    gain, n, best = answer["gain"], answer["gain"]["n"], NAMES[result["reference"]]
    unit, what = ("%", "held-out loss") if loss else (" points", f"accuracy ({result['metric']})")
    interval = ""
    if n:
        ends = (f"{value:+.1f}" if value is not None else "unbounded" for value in (gain["low"], gain["high"]))
        interval = f"a gain of {gain['estimate']:+.1f}{unit} [{', '.join(ends)}] in {what} over {best}, "
        interval += f"from {n} pairs of seeds; "
    text = f"{HEADS[answer['outcome']]}: {interval}{answer['why']}."
    if answer["outcome"] == "inconclusive":
        more = answer["more"]
        text += f" About {more} more seeds would decide." if more else " No number of seeds would decide."
    return text + (" Positive is better." if n else "") + _first_look(result)


def _first_look(result: Result) -> str:
    """A warning where the runs were too short to read every row once."""
    training, rows = result["training"], result["rows"]["train"]
    read = result["size"]["steps"] * training["batch_size"] * training["accumulation"]
    if read >= rows:
        return ""
    return f" A first look, no answer: each run read {read} of the {rows} training rows."


def _cost(result: Result) -> str:
    ours, theirs = result["cost"][GRIT], result["cost"][result["reference"]]
    parts = []
    if ours["step_seconds"] and theirs["step_seconds"]:
        a, b = ours["step_seconds"], theirs["step_seconds"]
        parts.append(f"{1000 * a:.0f} ms per step, {a / b:.2f} of {NAMES[result['reference']]}'s {1000 * b:.0f} ms")
    if ours["memory_bytes"] and theirs["memory_bytes"]:
        a, b = ours["memory_bytes"] / 2**20, theirs["memory_bytes"] / 2**20
        parts.append(f"{a:.0f} MiB of memory at its peak, {a - b:+.0f}")
    return "; ".join(parts) + ". Runs that share a machine disturb each other's clocks."


def _next(result: Result) -> str:
    answer, best = result["answer"], NAMES[result["reference"]]
    edges = [NAMES[arm] for arm in (GRIT, result["reference"]) if _at_the_end(result["tuned"][arm])]
    where = ""
    if edges:
        where = (
            f" The best learning rate of {' and '.join(edges)} lies at an end of its range: another --learning-rate "
            "moves the range, and may change the answer."
        )
    if answer["outcome"] == "yes":
        return f"Train with GRIT, at the learning rate that was found.{where}"
    if answer["outcome"] == "no":
        return f"Train with {best}, at the learning rate that was found.{where}"
    more = answer["more"]
    if more is None:
        return f"Train longer (--steps), or look at the data; until then {best} is the cheaper choice.{where}"
    seeds = answer["gain"]["n"] + more
    return f"Ask again with `--seeds {seeds}`, another `--seed` and a new `--out`, or take {best}.{where}"


def _at_the_end(tuned: Mapping[str, Any]) -> bool:
    return len(tuned["rates"]) > 1 and at_an_end(tuned["rates"], tuned["lr"])


def _commands(result: Result) -> list[str]:
    arm = GRIT if result["answer"]["outcome"] == "yes" else result["reference"]
    training, tuned = result["training"], result["tuned"][arm]
    options = {
        "--arm": "pure --preset recommended" if arm == GRIT else "baseline",
        "--base-model": quote(result["base_model"]),
        "--dataset": quote(result["dataset"]),
        "--max-steps": result["size"]["steps"],
        "--learning-rate": f"{tuned['lr']:g}",
        "--adam-beta1": training["beta1"],
        "--adam-beta2": training["beta2"],
        "--warmup-steps": training["warmup"],
        "--per-device-train-batch-size": training["batch_size"],
        "--gradient-accumulation-steps": training["accumulation"],
        "--max-length": training["max_length"],
        "--lora-r": training["rank"],
        "--lora-alpha": training["alpha"],
    }
    line = " ".join(f"{name} {value}" for name, value in options.items())
    if arm == "rslora":
        line += " --use-rslora"
    if arm == "loraplus":
        return [
            "    peft.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, "
            f"lr={tuned['lr']:g}, loraplus_lr_ratio={LORAPLUS_RATIO}, betas=({training['beta1']}, {training['beta2']}))"
        ]
    return [f"    grit train {line}"]


def _pairs(result: Result) -> list[str]:
    best, loss = result["reference"], result["metric"] == "loss"
    measure, form, gain = ("loss", "{:.4f}", "% lower") if loss else ("accuracy", "{:.1f}", "points higher")
    lines = [f"| seed | {NAMES[best]} | {NAMES[GRIT]} | {gain} |", "| --- | --- | --- | --- |"]
    gains = iter(result["answer"]["gains"])
    for pair in result["pairs"]:
        whole = all(pair[arm]["status"] == "done" for arm in (best, GRIT))
        shown = [
            form.format(pair[arm][measure]) if pair[arm]["status"] == "done" else "diverged" for arm in (best, GRIT)
        ]
        lines.append(f"| {pair['seed']} | {' | '.join(shown)} | {f'{next(gains):+.2f}' if whole else ''} |")
    if result["base"] is not None and result["base"][measure] is not None:
        lines += ["", f"The base, untrained: {form.format(result['base'][measure])}."]
    return lines


def _tuning(result: Result) -> list[str]:
    lines = ["| arm | learning rate: loss on the validation rows (nats per token) | chosen |", "| --- | --- | --- |"]
    for arm, tuned in result["tuned"].items():
        trials = sorted(zip(tuned["rates"], tuned["losses"], strict=True))
        listed = ", ".join(f"{lr:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for lr, loss in trials)
        lines.append(f"| {NAMES[arm]} | {listed} | {tuned['lr']:g} |")
    return lines


def _rules(result: Result) -> str:
    size, rows, smallest = result["size"], result["rows"], result["answer"]["smallest"]
    loss = result["metric"] == "loss"
    effect = f"{smallest:g}% of the loss" if loss else f"{smallest:g} points of accuracy"
    statistic = "the log of the ratio of the two losses" if loss else "the difference of the two accuracies"
    trials = len(result["tuned"][GRIT]["rates"])
    return (
        f"Fixed before any run: Student's paired t over seeds on {statistic}, two-sided, alpha {ALPHA:g}; the smallest "
        f"effect of interest is {effect}. Yes: the interval lies above zero. No: it excludes an effect of interest. "
        f"Every arm had {trials} trials, along the learning rate alone, on one seed and {rows['validation']} "
        f"validation rows; the opponent is the best of three by those trials, and met GRIT on {size['seeds']} other "
        f"seeds and {rows['test']} test rows. All runs trained {size['steps']} steps on {rows['train']} rows, a pair "
        "from the same adapters and the same batches. Rows that ask the same stand on one side. "
        "The interval is over seeds: it is for these held-out rows and these learning rates, which all seeds share."
    )
