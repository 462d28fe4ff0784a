"""Texts as token ids: the aggregate tokenizer, Canary's prompts and their slots, fast encoding of many texts.

Nothing here knows about corpora or rows: `data/corpora` checks languages and slots with this folder, and
`data/sequences` encodes whole blocks with it, so imports point here and never from here to them. Needs numpy and
sentencepiece alone; open `tokenizer` first, then `prompt`.
"""
