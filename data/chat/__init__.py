"""Chats as people have them: JSON lines, parquet and `datasets` folders, in the forms that are around.

records.py (rows of files) -> splits.py (train, validation, test) -> forms.py (row -> conversation) -> dataset.py
"""
