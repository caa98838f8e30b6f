"""Text, tables and the page for people."""
