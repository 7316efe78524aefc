"""Shows what was measured: consoles, tables, pages, and the machine that was used."""
