"""The report of a run: one self-contained page, with figures."""

from moth_jax.report.page import Report, write_report

__all__ = ["Report", "write_report"]
