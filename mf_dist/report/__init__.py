"""A run as one HTML file that a person can look at: report.html."""
