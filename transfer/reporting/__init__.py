"""The report page, its charts and findings, and the model card.

python -m transfer.reporting outputs/x                # draw report.html of a finished run again
python -m transfer.reporting outputs/x outputs/y      # is one of two runs better, or is it noise?
"""
