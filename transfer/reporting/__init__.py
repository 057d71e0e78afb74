"""The report page with its charts and findings, and the model card.

python -m transfer.reporting outputs/x                # write report.html of a finished run again
python -m transfer.reporting outputs/x outputs/y      # compare two runs: is one better, or is it noise?
"""
