"""Everything in this folder is compiled once per instruction set; nothing else lives here."""
