"""The text of the demo: short everyday dialogues with summaries, and requests with replies, from templates.

A scenario fills the same slots (a day, a place, a price ...) into the turns of a dialogue, into several wordings of
its summary, and into questions about it, so what a summary says can be read off the dialogue.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

SLOTS = {
    "name2": ["Kate", "Leo", "Maria", "Nick", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "time": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    "place": ["the station", "the library", "the park", "the museum", "the market", "the harbour", "the school"],
    "event": ["a concert", "a picnic", "a football match", "a birthday party", "a film", "a dance class", "a lecture"],
    "dish": ["fish", "pasta", "soup", "rice", "pizza", "salad", "curry"],
    "ware": ["shoes", "a coat", "a lamp", "a bicycle", "a camera", "a chair", "a phone", "a watch"],
    "price": ["twenty", "thirty", "forty", "fifty", "sixty", "eighty", "ninety"],
    "defect": ["is broken", "is too loud", "does not work", "is very old", "is dirty", "stopped yesterday"],
    "device": ["the heater", "the shower", "the window", "the fridge", "the radio", "the door"],
    "pain": ["headache", "cough", "fever", "back pain", "toothache", "sore throat"],
    "cure": ["drink warm tea", "stay in bed", "take two pills a day", "rest for a week", "see a specialist"],
    "city": ["Rome", "Paris", "Oslo", "Madrid", "Vienna", "Dublin", "Prague"],
    "vehicle": ["train", "bus", "plane", "ferry", "car"],
    "thing": ["the dictionary", "the guitar", "the tent", "the ladder", "the old map", "the laptop"],
    "job": ["driver", "cook", "teacher", "nurse", "gardener", "clerk"],
    "years": ["two", "three", "four", "five", "six", "seven"],
}
OPENINGS = ["Hi, {name2}.", "Good morning.", "Hello, {name2}, do you have a minute?", "Excuse me.", "Hey, {name2}!"]
CLOSINGS = ["Thanks a lot.", "See you then.", "All right, bye.", "That is very kind.", "Great, thank you."]


@dataclass(frozen=True)
class Scenario:
    """Templates of one topic: turns (one wording of each is chosen), summaries, questions with their answers."""

    topic: str
    turns: list[list[str]]
    summaries: list[str]
    questions: list[tuple[str, str]]


SCENARIOS = [
    Scenario(
        "invitation",
        [
            ["{open} Would you like to come to {event} on {day}?", "{open} There is {event} on {day}. Will you come?"],
            ["I would love to. When does it start?", "Sounds good. What time should I be there?"],
            ["At {time}. We meet at {place}.", "It starts at {time}. Let us meet at {place}."],
            ["Perfect, I will be there. {close}", "Good, I will come to {place}. {close}"],
        ],
        [
            "#Person1# invites #Person2# to {event} on {day}. They will meet at {place} at {time}.",
            "#Person2# will go to {event} with #Person1# on {day} and they meet at {time} at {place}.",
            "#Person1# and #Person2# plan to go to {event} on {day}, meeting at {place} at {time}.",
        ],
        [
            ("what are they going to", "{event}"),
            ("on which day", "{day}"),
            ("at what time", "{time}"),
            ("where", "{place}"),
        ],
    ),
    Scenario(
        "restaurant",
        [
            ["{open} I would like a table for {day}.", "{open} Can I book a table on {day}, please?"],
            ["Of course. For what time?", "Certainly. When will you arrive?"],
            ["At {time}, please. Do you have {dish}?", "We come at {time}. Is there {dish} on the menu?"],
            ["Yes, our {dish} is very good. {close}", "Yes, we serve {dish} every day. {close}"],
        ],
        [
            "#Person1# books a table for {day} at {time}. #Person2# says they have {dish}.",
            "#Person1# reserves a table on {day} at {time} and wants to eat {dish}.",
            "#Person2# takes a booking from #Person1# for {day} at {time} and recommends the {dish}.",
        ],
        [("on which day", "{day}"), ("at what time", "{time}"), ("what food", "{dish}")],
    ),
    Scenario(
        "shopping",
        [
            ["{open} I am looking for {ware}.", "{open} Do you sell {ware}?"],
            ["Yes. This one costs {price} dollars.", "We do. It is {price} dollars."],
            ["That is too expensive. Can you make it cheaper?", "It is a lot of money. Is there a discount?"],
            ["I can give you ten dollars off if you pay today. {close}", "Ten dollars off, but only today. {close}"],
        ],
        [
            "#Person1# wants to buy {ware} for {price} dollars. #Person2# offers ten dollars off.",
            "#Person2# sells {ware} for {price} dollars and gives #Person1# a discount of ten dollars.",
            "#Person1# finds {price} dollars too expensive for {ware}, so #Person2# takes ten dollars off.",
        ],
        [("what is for sale", "{ware}"), ("how many dollars", "{price}")],
    ),
    Scenario(
        "complaint",
        [
            ["{open} I have a problem. {Device} in my room {defect}.", "{open} {Device} {defect}. Can you help?"],
            ["I am sorry to hear that. I will send someone on {day}.", "Sorry. Somebody will come on {day}."],
            ["Can it be earlier? I need it every day.", "That is late. Could you come sooner?"],
            ["Then we come at {time} today. {close}", "All right, someone comes today at {time}. {close}"],
        ],
        [
            "#Person1# complains that {device} {defect}. #Person2# will send someone today at {time}.",
            "#Person1# tells #Person2# that {device} {defect}, and #Person2# sends help at {time} today, not on {day}.",
            "{Device} of #Person1# {defect}. #Person2# first offers {day} and then today at {time}.",
        ],
        [("what has a problem", "{device}"), ("what is the problem", "it {defect}"), ("at what time", "{time}")],
    ),
    Scenario(
        "doctor",
        [
            ["{open} I do not feel well, doctor.", "{open} Doctor, I feel ill."],
            ["What is the matter?", "Tell me what is wrong."],
            ["I have had a {pain} since {day}.", "It is a {pain}. It began on {day}."],
            ["You should {cure}. {close}", "It is not serious. Please {cure}. {close}"],
        ],
        [
            "#Person1# has had a {pain} since {day}. The doctor tells #Person1# to {cure}.",
            "#Person1# sees a doctor because of a {pain} that began on {day} and should {cure}.",
            "#Person2# advises #Person1#, who has a {pain} since {day}, to {cure}.",
        ],
        [("what is the illness", "{pain}"), ("since which day", "{day}"), ("what is the advice", "{cure}")],
    ),
    Scenario(
        "travel",
        [
            ["{open} I want to travel to {city} on {day}.", "{open} How can I get to {city} on {day}?"],
            ["You can take the {vehicle} at {time}.", "There is a {vehicle} that leaves at {time}."],
            ["How much is a ticket?", "What does it cost?"],
            ["It costs {price} dollars. {close}", "A ticket is {price} dollars. {close}"],
        ],
        [
            "#Person1# wants to go to {city} on {day}. #Person2# suggests the {vehicle} at {time} for {price} dollars.",
            "#Person1# will travel to {city} on {day} by {vehicle} at {time}. The ticket costs {price} dollars.",
            "#Person2# tells #Person1# that the {vehicle} to {city} on {day} leaves at {time} and is {price} dollars.",
        ],
        [
            ("which city", "{city}"),
            ("on which day", "{day}"),
            ("how do they travel", "{vehicle}"),
            ("how many dollars", "{price}"),
        ],
    ),
    Scenario(
        "borrowing",
        [
            ["{open} Can I borrow {thing}?", "{open} May I use {thing} for a while?"],
            ["Sure, but I need it back on {day}.", "Yes. Please return it on {day}."],
            ["No problem. Where can I bring it?", "I will. Where shall we meet?"],
            ["Bring it to {place}. {close}", "At {place}, please. {close}"],
        ],
        [
            "#Person1# borrows {thing} from #Person2# and will return it on {day} at {place}.",
            "#Person2# lends {thing} to #Person1#, who has to bring it to {place} on {day}.",
            "#Person1# asks #Person2# for {thing}. #Person2# wants it back on {day} at {place}.",
        ],
        [("what is lent", "{thing}"), ("on which day", "{day}"), ("where", "{place}")],
    ),
    Scenario(
        "interview",
        [
            ["{open} I am here for the job as a {job}.", "{open} I would like to work as a {job}."],
            ["Do you have any experience?", "Have you worked as a {job} before?"],
            ["Yes, I worked in {city} for {years} years.", "I did that for {years} years in {city}."],
            ["Good. You can start on {day}. {close}", "Fine, then we see you on {day}. {close}"],
        ],
        [
            "#Person1# applies for a job as a {job}, having worked in {city} for {years} years, and starts on {day}.",
            "#Person1# worked in {city} for {years} years. #Person2# lets #Person1# start as a {job} on {day}.",
            "#Person2# interviews #Person1# for a job as a {job}. #Person1# has {years} years of experience in {city}.",
        ],
        [
            ("what is the job", "{job}"),
            ("which city", "{city}"),
            ("how many years", "{years}"),
            ("on which day", "{day}"),
        ],
    ),
]


@dataclass(frozen=True)
class Example:
    """A dialogue with three wordings of its summary and questions with their answers."""

    dialogue: str
    summaries: list[str]
    topic: str
    questions: list[tuple[str, str]]


# What a speaker may leave open: then the dialogue has two values, and each summary takes one of them, as annotators do.
OPEN_SLOTS = ("day", "time", "place", "city", "price")
UNDECIDED = ["I am not sure which yet.", "I will tell you tomorrow which one.", "One of the two, I forgot which."]


def examples(rng: random.Random, ambiguous: float = 0.0) -> Iterator[Example]:
    """An endless stream of dialogues.

    Args:
        ambiguous: Share of dialogues that leave one of their facts open between two values.
    """
    while True:
        scenario = rng.choice(SCENARIOS)
        slots = {name: rng.choice(values) for name, values in SLOTS.items()}
        slots["open"] = rng.choice(OPENINGS).format(**slots)
        slots["close"] = rng.choice(CLOSINGS)
        slots["Device"] = slots["device"].capitalize()
        turns = [rng.choice(wordings) for wordings in scenario.turns]
        said, written = slots, [slots] * len(scenario.summaries)
        open_slots = (
            [name for name in OPEN_SLOTS if any(f"{{{name}}}" in summary for summary in scenario.summaries)]
            if ambiguous and rng.random() < ambiguous
            else []
        )
        if open_slots:
            name = rng.choice(open_slots)
            values = rng.sample(SLOTS[name], 2)
            said = {**slots, name: f"{values[0]} or {values[1]}", "close": rng.choice(UNDECIDED)}
            written = [{**slots, name: rng.choice(values)} for _ in scenario.summaries]
        spoken = [turn.format(**said) for turn in turns]
        yield Example(
            dialogue="\n".join(f"#Person{1 + i % 2}#: {turn}" for i, turn in enumerate(spoken)),
            summaries=[summary.format(**own) for summary, own in zip(scenario.summaries, written, strict=True)],
            topic=f"{scenario.topic}, undecided" if open_slots else scenario.topic,
            questions=[(question, answer.format(**slots)) for question, answer in scenario.questions],
        )


REQUESTS = [
    "Would you like to come to {event} on {day}?",
    "Can you help me with {thing}?",
    "Could you drive me to {place} at {time}?",
    "Shall we travel to {city} on {day}?",
    "Will you cook {dish} for us on {day}?",
    "Can I have {thing} until {day}?",
    "Do you want to meet at {place} at {time}?",
]
# Replies with the probability that the speaker means yes. The undecided ones make the best attainable accuracy < 1.
REPLIES = [
    ("Yes, I would love to.", 1.0),
    ("Sure, that works for me.", 1.0),
    ("Of course, see you then.", 1.0),
    ("With pleasure, I have time on {day}.", 1.0),
    ("Good idea, count me in.", 1.0),
    ("No problem at all.", 1.0),
    ("Sorry, I have to work on {day}.", 0.0),
    ("I am afraid I cannot.", 0.0),
    ("No, I have other plans.", 0.0),
    ("Not this time, I am too tired.", 0.0),
    ("I would rather stay at home.", 0.0),
    ("That is impossible for me.", 0.0),
    ("Let me check my calendar first.", 0.7),
    ("Maybe, I will tell you on {day}.", 0.5),
    ("It depends on the weather.", 0.3),
]


def replies(rng: random.Random, count: int) -> list[dict[str, str | int]]:
    """Requests with replies and whether they accept (label 1) or decline (0)."""
    rows: list[dict[str, str | int]] = []
    for index in range(count):
        slots = {name: rng.choice(values) for name, values in SLOTS.items()}
        reply, chance = rng.choice(REPLIES)
        rows.append(
            {
                "sentence1": rng.choice(REQUESTS).format(**slots),
                "sentence2": reply.format(**slots),
                "label": int(rng.random() < chance),
                "idx": index,
            }
        )
    return rows


def best_accuracy() -> float:
    """Accuracy of the Bayes-optimal classifier of replies."""
    return sum(max(chance, 1 - chance) for _, chance in REPLIES) / len(REPLIES)
