"""The tokenizer that ships with the package: byte-level BPE, 512 tokens, any Unicode text comes back as it went in.

The files beside this page are written by ``python -m deepstack_pl.language.tokenizer.build`` and read by
``deepstack_pl.language.conversation.load_tokenizer(None)``, or by ``AutoTokenizer.from_pretrained`` of this folder.
"""
