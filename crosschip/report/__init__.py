"""From documents to pages: everything here reads JSON and JSONL files and never a tensor."""

from crosschip.report.page import write_run_page
from crosschip.report.summary import voyage_summary

__all__ = ["voyage_summary", "write_run_page"]
