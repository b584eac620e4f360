"""Labels from language models: what a method is, what it may ask a judge, and the methods.

queries     a query with the documents put up for it
method      the contract of a method, and the methods by name
judge       a language model as methods use it: cached, counted, within a budget
lists       asking about a list: orders, windows, retries; parsing and permutations make votes of the replies
talk        talks of several turns, held side by side
reading     a reader answering in contexts, which gains are computed from
step        the step of the shard engine that runs a method over queries
"""
