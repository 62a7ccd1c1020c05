"""Networks: torch only, no process group."""
