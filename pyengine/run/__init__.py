"""From prompts to text: requests, the scheduler that steps them together, and what comes out.

    request.py    tokens on their way, and how far they have got
    scheduler.py  one step: who is granted which tokens, one forward, one sampling
    output.py     sampled tokens -> text, piece by piece
    pages.py      how much memory the cache of keys and values may take
"""
