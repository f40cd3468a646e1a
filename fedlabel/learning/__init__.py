"""What a client and the server do with data in a round: plan, batches, local steps, measurements."""
