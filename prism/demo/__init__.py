"""Three tiny language models that ship with Prism; their answers show whether they are served right."""
