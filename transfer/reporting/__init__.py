"""Numbers of a run and what is made of them: metrics.json, the model card, report.html, the comparison of two runs.

python -m transfer.reporting outputs/x                # draw report.html of a finished run again
python -m transfer.reporting outputs/x outputs/y      # is one of two runs better, or is it noise?
"""

from transfer.reporting.card import keep_card, write_card
from transfer.reporting.metrics import measure, read_metrics, write_metrics
from transfer.reporting.report import draw_report

__all__ = ["draw_report", "keep_card", "measure", "read_metrics", "write_card", "write_metrics"]
