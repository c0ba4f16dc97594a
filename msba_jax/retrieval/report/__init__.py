"""Reports: one self-contained HTML file that shows what retrieval does."""
