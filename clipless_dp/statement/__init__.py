"""The privacy statement: what was promised about whom, on which grounds, and what the promise leaves out.

It answers the questions that Ponomareva et al. 2023, "How to DP-fy ML", section 5.3, want answered next to every ε:
setting, unit of privacy, neighbouring relation, data accesses covered, what is released, sampling, accounting, and how
a reader can check all that.
"""

from clipless_dp.statement.report import PrivacyStatement, report, report_ledger, statement_files

__all__ = ["PrivacyStatement", "report", "report_ledger", "statement_files"]
