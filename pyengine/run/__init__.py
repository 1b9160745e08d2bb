"""From prompts to text: requests, the scheduler that steps them together, and what comes out.

    request.py      tokens on their way, and how far they have got
    scheduler.py    one step: who is granted which tokens, one forward, one sampling
    stream.py       callers: who waits for requests, and how
    output.py       sampled tokens -> text, piece by piece
    pages.py        how much memory the cache of keys and values may take
    guide.py        which tokens a grammar allows next (gbnf.py: grammars in llama.cpp's notation)
    speculation.py  which tokens to guess ahead, and how many; proposer.py: networks that guess (draft_model.py, draft_head.py),
                    acceptance.py: how often their guesses come true, and whether asking them pays
"""
