"""The report of a run: one self-contained page, with figures."""

from moth_jax.report.page import write_report

__all__ = ["write_report"]
