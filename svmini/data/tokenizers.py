"""Tokenizers: a byte-pair encoding that svmini trains, and GPT-2's. Both are a tiktoken.Encoding."""

from collections import Counter, defaultdict

from ..errors import MissingFile

GPT2_VOCAB = 50257
# GPT-2 cuts a text into contractions, words, numbers, punctuation and spaces; no token crosses a cut
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tokenizer_of(stored):
    """Return the tokenizer for the value that a model file stores: "gpt2", or the ranks from train_bpe."""
    return gpt2_tokenizer() if stored == "gpt2" else bpe_tokenizer(stored)


def train_bpe(text, vocab_size=1024):
    """Train a byte-level byte-pair encoding (Sennrich et al. 2016), as GPT-2 does.

    The first 256 tokens are the single bytes, so every text can be encoded. Each further token joins the most
    frequent pair of adjacent tokens; of equally frequent pairs, the one with the smaller ids. Returns the bytes of
    each token in hexadecimal, by rank: a list of strings, which JSON and checkpoints can hold. The list is shorter
    than vocab_size if no pair occurs twice.
    """
    import regex
    counts = Counter(regex.findall(GPT2_PATTERN, text))            # each distinct word, with its count
    # a word is a string of tokens, the token i as the character i
    words = [(word.encode("utf-8").decode("latin-1"), n) for word, n in counts.items()]
    pair_counts, found_in = Counter(), defaultdict(set)
    for i, (word, n) in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += n
            found_in[pair].add(i)
    tokens = [bytes([b]) for b in range(256)]                      # the id of a token is its index
    while len(tokens) < vocab_size:
        most = max(pair_counts.values(), default=0)
        if most < 2:
            break
        pair = min(p for p, n in pair_counts.items() if n == most)
        new = chr(len(tokens))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        for i in found_in.pop(pair):
            word, n = words[i]
            shorter = word.replace("".join(pair), new)             # from left to right
            pairs = Counter(zip(shorter, shorter[1:]))
            pairs.subtract(zip(word, word[1:]))                    # pairs that this word gains and loses
            for other, difference in pairs.items():
                pair_counts[other] += n * difference
                if difference > 0:
                    found_in[other].add(i)
            words[i] = shorter, n
    return [token.hex() for token in tokens]


def bpe_tokenizer(ranks):
    """Return the tokenizer for the ranks from train_bpe."""
    import tiktoken
    return tiktoken.Encoding("svmini", pat_str=GPT2_PATTERN, special_tokens={}, explicit_n_vocab=len(ranks),
                             mergeable_ranks={bytes.fromhex(token): i for i, token in enumerate(ranks)})


def gpt2_tokenizer():
    """Return GPT-2's tokenizer (50,257 tokens), which tiktoken downloads once. Raises MissingFile if that fails."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:   # tiktoken raises whatever its network library raises
        raise MissingFile(f"GPT-2's tokenizer could not be downloaded ({type(error).__name__}): set TIKTOKEN_CACHE_DIR "
                          "to a folder that tiktoken filled elsewhere, or pretrain a base model, whose trained BPE "
                          "needs no network") from None


def end_token(tokenizer):
    """Return the token that ends an answer: <|endoftext|> in GPT-2's tokenizer, else the byte 0 (in no text)."""
    special = "<|endoftext|>" in tokenizer.special_tokens_set
    return tokenizer.eot_token if special else tokenizer.encode_single_token(b"\0")
