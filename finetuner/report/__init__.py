"""Pages for people: the preview of a recipe's rows as HTML."""
