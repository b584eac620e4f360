"""The shard engine: plan -> read -> transform -> commit -> assemble -> finish."""
