"""The report of a run, or a comparison of runs, as one HTML file: report.html."""
