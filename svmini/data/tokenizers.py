"""Tokenizers: byte-pair encoding that is trained here, and GPT-2's. Both are a tiktoken.Encoding, of which svmini uses
encode_ordinary(text), decode(ids), n_vocab and eot_token."""

from collections import Counter, defaultdict

from ..errors import MissingFile

GPT2_VOCAB = 50257
# Where GPT-2 cuts a text, so that no token crosses a cut: contractions, words, numbers, other marks, spaces
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tokenizer_of(kept):
    """The tokenizer that a model keeps the name or the ranks of: "gpt2", or what train_bpe returned."""
    return gpt2_tokenizer() if kept == "gpt2" else bpe_tokenizer(kept)


def train_bpe(text, vocab_size=1024):
    """Byte-pair encoding (Sennrich et al. 2016) on bytes, as in GPT-2: the tokens' bytes in hexadecimal, by rank.

    The first 256 are the single bytes, so every text can be encoded; each further one joins the pair of tokens
    that stands side by side most often (of equally frequent pairs the one with the smaller ids). Returns a list of
    strings, plain values for JSON or a checkpoint; it is shorter than vocab_size where no pair is left that occurs
    twice.
    """
    import regex
    counts = Counter(regex.findall(GPT2_PATTERN, text))            # each different word once, with its count
    words = [(list(word.encode("utf-8")), n) for word, n in counts.items()]
    pair_counts, found_in = Counter(), defaultdict(set)
    for i, (ids, n) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pair_counts[pair] += n
            found_in[pair].add(i)
    tokens = [bytes([b]) for b in range(256)]                      # a token's id is its place
    while len(tokens) < vocab_size:
        most = max(pair_counts.values(), default=0)
        if most < 2:
            break
        pair = min(p for p, n in pair_counts.items() if n == most)
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for i in found_in.pop(pair):
            ids, n = words[i]
            shorter = join_pair(ids, pair, new)
            pairs = Counter(zip(shorter, shorter[1:]))
            pairs.subtract(zip(ids, ids[1:]))                      # what this word gains and loses by the join
            for other, difference in pairs.items():
                pair_counts[other] += n * difference
                if difference > 0:
                    found_in[other].add(i)
            words[i] = shorter, n
    return [token.hex() for token in tokens]


def join_pair(ids, pair, new):
    """ids with every occurrence of pair, from the left, replaced by new."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def bpe_tokenizer(ranks):
    """The tokenizer of what train_bpe returned."""
    import tiktoken
    return tiktoken.Encoding("svmini", pat_str=GPT2_PATTERN, special_tokens={}, explicit_n_vocab=len(ranks),
                             mergeable_ranks={bytes.fromhex(token): i for i, token in enumerate(ranks)})


def gpt2_tokenizer():
    """GPT-2's tokenizer (50,257 tokens), downloaded once by tiktoken. Raises MissingFile where it cannot."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:   # tiktoken passes on whatever its network library raises
        raise MissingFile(f"GPT-2's tokenizer could not be downloaded ({type(error).__name__}): set TIKTOKEN_CACHE_DIR "
                          f"to a folder that tiktoken filled on another device_config, or start from a model pretrained "
                          f"here, whose trained BPE needs no network") from None


def end_token(tokenizer):
    """The token that ends an answer: <|endoftext|> in GPT-2's tokenizer, elsewhere the byte 0, which no text holds."""
    special = "<|endoftext|>" in tokenizer.special_tokens_set
    return tokenizer.eot_token if special else tokenizer.encode_single_token(b"\0")
