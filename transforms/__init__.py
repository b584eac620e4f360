"""What happens to a batch: pure functions RecordBatch -> RecordBatch, and the thin PTransforms that wire them."""
