"""How it is shown: console, figures, one HTML file, JSON, exports."""
