"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

from lm.checkpoint import Progress


def plot_losses(path: Path, title: str, progress: Progress, baselines: dict[str, float]) -> None:
    """Draw training and held-out loss over the steps, and the baselines to beat."""
    from matplotlib.figure import Figure  # where it is drawn: most processes of a run never do

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(progress.train_bits) + 1)
    axes.plot(steps, progress.train_bits, color="C0", alpha=0.25, linewidth=1)
    axes.plot(steps, smooth(progress.train_bits), color="C0", label="training")
    validated = progress.held_out_bits
    axes.plot([*validated], [*validated.values()], "o-", color="C1", label="held out")
    for style, (name, bits) in zip((":", "--"), baselines.items(), strict=True):
        axes.axhline(bits, color="0.4", linestyle=style, label=f"{name}, held out: {bits:.2f}")
    axes.set(title=title, xlabel="step", ylabel="bits per byte")
    axes.set_ylim(0, 1.1 * max(*baselines.values(), *validated.values()))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    averages: list[float] = []
    total = mass = 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        averages.append(total / mass)
    return averages
