"""The rules of a comparison as a picture: FID against the time that sampling takes."""

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def quality_against_time(results: Mapping[str, Any]) -> "Figure":
    """FID / floor, mean and standard deviation over training seeds, against seconds of sampling per 1,000 images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    measured = results["benchmarks"]["scores"]["figures"]["rules"]
    for rule in results["rules"]:
        ratios = [run["fid_ratio"] for run in rule["runs"]]
        seconds = 1000 / measured[rule["rule"]]["sampling_images_per_second"]
        spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        axes.errorbar([seconds], [statistics.fmean(ratios)], [spread], marker="o", capsize=4, label=rule["rule"])
    axes.set(xscale="log", xlabel="seconds of sampling per 1,000 images, with guidance", ylabel="FID / floor")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())  # which would collide over a narrow range
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
