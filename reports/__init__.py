"""Reports: reads the files of a comparison and writes tables, figures and one HTML page. Never imports torch."""

from recollect.reports.ablation import AblationReport, AblationReportFiles, publish_ablation, write_ablation_report
from recollect.reports.ablation_results import Ablation, is_ablation, load_ablation
from recollect.reports.errors import ReportError
from recollect.reports.results import Cell, CrossoverRow, Results, Streaming, Tokens, load_results
from recollect.reports.writing import ReportFiles, write_report

__all__ = [
    "Ablation",
    "AblationReport",
    "AblationReportFiles",
    "Cell",
    "CrossoverRow",
    "ReportError",
    "ReportFiles",
    "Results",
    "Streaming",
    "Tokens",
    "is_ablation",
    "load_ablation",
    "load_results",
    "publish_ablation",
    "write_ablation_report",
    "write_report",
]
