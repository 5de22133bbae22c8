"""What a run leaves for a reader: `summary.json`, one self-contained page, and figures."""

from moth_jax.report.figures import plot_distance_matrix
from moth_jax.report.page import write_report
from moth_jax.report.summary import write_summary

__all__ = ["plot_distance_matrix", "write_report", "write_summary"]
