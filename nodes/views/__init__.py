"""What blocks show: tables, curves, drawings."""
