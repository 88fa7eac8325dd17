"""What people see: metrics, charts, console, pages."""
