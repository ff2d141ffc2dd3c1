"""The HTTP side: OpenAI's API, templates, text, and the life of each request until its one end.

app -> prepare (schemas, templates, tokenizers) -> dispatcher (requests, routing, recovery) -> links -> worker
client <- responses <- streams (detokenizer) <- dispatcher <- links <- worker
"""
