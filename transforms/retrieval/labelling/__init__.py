"""Labels from language models: what a method is, what it may ask a judge, and the methods.

queries     a query with the documents put up for it
method      the contract of a method, and the methods by name
judge       a language model as methods use it: cached, counted, within a budget
step        the step of the shard engine that runs a method over queries
"""
