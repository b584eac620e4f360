"""What the retrieval jobs share: the folder of tables they write, and how they find texts and labels."""
