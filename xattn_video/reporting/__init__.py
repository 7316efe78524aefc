"""Shows what was measured: consoles, tables, pages, and the machine it belongs to."""
