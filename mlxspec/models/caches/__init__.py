"""How a model's past is kept, so that a round can always take its proposals back.

mlx-lm's cache     here              what it holds
KVCache            FullLayer         every position; grows
QuantizedKVCache   QuantizedLayer    every position, in fewer bits; grows
RotatingKVCache    RingLayer         the last window of positions, and room for a round's rows
ArraysCache        RecurrentLayer    states, and during a round those after each of its rows
CacheList          a list            one of the above for each of its caches
anything else      HostedLayers      mlx-lm's caches themselves, copied before they change
"""
