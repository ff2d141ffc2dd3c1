"""One device: its memory, its models' engines and the loop that shares both between them."""
