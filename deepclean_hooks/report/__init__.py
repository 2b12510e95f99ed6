"""What a person shows their auditor, as text, JSON, HTML and Markdown."""
