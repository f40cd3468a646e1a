"""Data of real nodes: folders, the schema that they share, and the federation that server and nodes make of them."""
