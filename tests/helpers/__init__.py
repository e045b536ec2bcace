"""What the tests share: tiny models, trainers, commands, a Hub."""
