"""The stories: five shapes over one set of rules. `STORIES` is their grammar.

A shape has slots, and sentences that speak of them. The same rows come back all through a story, often
further apart than a short attention window: whose present the kite was, what stuck to the kitten's feet, who was asked.
"""

from collections.abc import Callable, Mapping

from lobit.demo import phrases
from lobit.demo.grammar import Choice, Grammar, Row, Slot, Story
from lobit.demo.template import story


def _another(row: Row, parent: Row) -> bool:
    """Whether the rows differ: two slots draw from the same rows, and never the same row."""
    return row["name"] != parent["name"]


def _reached(row: Row, parent: Row) -> bool:
    """Whether a thing can be lost in a place of the parent's kind, a spot is such a place, or a beast gets there."""
    return parent["name"] in row["reach"].split()


def _slots(**rows: tuple[Row, ...]) -> dict[str, Slot]:
    """Slots that depend on no other."""
    return {name: Slot(name, values) for name, values in rows.items()}


def _children(parent: str, fits: Callable[[Row, Row], bool], **rows: tuple[Row, ...]) -> dict[str, Slot]:
    """Slots that depend on one other."""
    return {name: Slot(name, values, parent, fits) for name, values in rows.items()}


SLOTS = (
    _slots(hero=phrases.CHILDREN, kin=phrases.RELATIVES, keeper=phrases.KEEPERS, pet=phrases.ANIMAL_NAMES)
    | _slots(trade=phrases.TRADES, trait=phrases.TRAITS, place=phrases.PLACES, colour=phrases.COLOURS)
    | _slots(hour=phrases.HOURS, treat=phrases.TREATS, craft=phrases.CRAFTS, chore=phrases.CHORES)
    | _slots(count=phrases.COUNTS, young=phrases.YOUNG, clue=phrases.CLUES, toy=phrases.TOYS)
    | _slots(room=phrases.ROOMS, noise=phrases.NOISES, fear=phrases.FEARS, reach=phrases.REACHES)
    | _children("reach", _reached, thing=phrases.THINGS, spot=phrases.SPOTS, beast=phrases.BEASTS)
    | _children("hero", _another, friend=phrases.CHILDREN)
)

COMMON = {
    "open": (
        "2:Once there was {trait.a} {hero.child} [named|called] {hero} who lived {place}.",
        "2:{hero} was {trait.a} {hero.child} who lived {place}.",
        "2:In {odd} house {place} lived {trait.a} {hero.child} named {hero}.",
        "Long ago, {place}, there lived {trait.a} {hero.child} called {hero}.",
        "Everyone {place} knew {hero}, {trait.a} {hero.child} with {odd} [hat|coat|dog|face].",
    ),
    "scene": (
        "It was a {weather} {hour}, and [far away|somewhere|nearby] [a dog barked|a bell rang|someone sang|a door shut].",
        "One {weather} {hour} {hero.he} [was alone|had no school|could not sleep|was in the kitchen].",
        "One {weather} {hour} {hero.he} [put on|looked for] {hero.his} {strange} [boots|coat|hat|scarf].",
        "The {hour} was {weather}, and the [road|house|garden|wind] was [quiet|full of birds|as still as a stone].",
    ),
    "weather": ("2:sunny", "2:cold", "windy", "warm", "foggy", "bright", "grey"),
    "strange": ("2:old", "2:little", "big", "strange", "fine", "plain", "dusty", "pretty", "heavy", "odd"),
    "odd": (
        "2:an old",
        "2:a little",
        "a big",
        "a strange",
        "a fine",
        "a plain",
        "a dusty",
        "a pretty",
        "a heavy",
        "an odd",
    ),
    "number": ("ten", "twelve", "twenty", "thirty", "forty", "a hundred"),
    "said": ("3:said", "answered", "whispered", "cried", "sighed", "laughed"),
    "how": ("softly", "slowly", "proudly", "quickly", "kindly", "with a smile"),
    "moral": (
        "2:From that day on, {trait.moral}.",
        "2:And after that, {trait.moral}.",
        "And so, {place}, {trait.moral}.",
        "{hour.later}, back {place}, {trait.moral}.",
    ),
}

LOST = {
    "keepsake": (
        "{hero.He} [always had|went nowhere without] {colour.a} {thing} from {hero.his} {kin}.",
        "{hero.His} {kin} had [made|bought|found] {hero.him} {colour.a} {thing}.",
        "What {hero.he} loved most was the {colour} {thing} of {hero.his} {kin}.",
    ),
    "mishap": (
        "[2:Suddenly|All at once|Then] the {thing} {reach.went} {spot.to}.",
        "{hero} [looked away|turned around|let go], and the {colour} {thing} {reach.went} {spot.to}.",
    ),
    "attempt": (
        "{hero} {reach.try}, but {reach.fail}.",
        "{hero.He} {reach.try} {number} times, but {reach.fail}.",
        "First {hero.he} {reach.try}, but {reach.fail}. Then {hero.he} {reach.try}, but {reach.fail}.",
    ),
    "meeting": (
        "Just then {odd} {beast} came [by|out from behind a tree|down the road]. {pet.His} name was {pet}.",
        "[Nearby|Not far away], {beast.a} named {pet} had [seen|heard] it all.",
        '"Why are you so [sad|quiet|cross]?" asked {odd} {beast}. "I am {pet}."',
        "Along came {pet}, {beast.a} with {odd} [hat|coat|scarf|bag].",
    ),
    "talk": (
        '"My {colour} {thing} is {spot}," {said} {hero}. "I can {beast.skill}," {said} {pet} {how}.',
        '"My {kin} gave me that {thing}," {said} {hero}. "Wait here," {said} {pet}. "I can {beast.skill}."',
        '{hero} told {pet.him} {how} about the {thing} {spot}. "Nobody can {beast.skill} like {beast.a}," {said} {pet}.',
    ),
    "rescue": (
        "{pet} {beast.did} and came back with the {thing} in {pet.his} {beast.carry}.",
        "{pet.He} {beast.did}, and [soon|at once|after a while] {pet.he} had the {colour} {thing} in {pet.his} {beast.carry}.",
        "{hero} counted to {number}, and there was {pet} with the {thing} in {pet.his} {beast.carry}.",
    ),
    "thanks": (
        '"Thank you, {pet}!" {said} {hero}, and gave {pet.him} {treat.a}.',
        "{hero} [laughed|danced|sang] and shared {treat.a} with {pet} the {beast}.",
        "{hero} [ran home for|bought {pet.him}] {treat.a}.",
    ),
}

GIFT = {
    "wish": (
        "{hero.He} wanted to make {hero.his} {kin} {colour.a} {craft}.",
        "{hero.His} {kin} was [sad|cold|coming home], so {hero} wanted to make {kin.him} {colour.a} {craft}.",
        '"I will make {colour.a} {craft} for my {kin}," {said} {hero} {how}.',
    ),
    "shop": (
        "But a {craft} needs {craft.part}, and only {odd} {trade} called {keeper} had any.",
        "For that {hero.he} needed {craft.part}, so {hero.he} went {how} to {keeper} the {trade}.",
        '"May I have some {craft.part}?" {hero.he} asked {keeper}, {odd} {trade} with {odd} [hat|coat|dog|face].',
    ),
    "deal": (
        '"[Yes|Maybe|Why not]," {said} {keeper}, "if you {chore} for {count} days."',
        '"{chore.start} for {count} days, {hero}," {said} {keeper}, "and it is yours."',
        '"First {chore} for {count} days," {keeper.he} said {how}.',
    ),
    "toil": (
        "So for {count} days {hero} {chore.did}, [even in the rain|and sang {how}|until {hero.his} arms were heavy].",
        "{hero} {chore.did} {number} times, and the {count} days went by {how}.",
        "{hero.He} {chore.did}, and one {weather} day {keeper} brought {hero.him} {odd} [hat|scarf|coat].",
    ),
    "rest": (
        "Then {keeper} gave {hero.him} {treat.a} and the {craft.part}, and {hero.he} made the {craft} {how}.",
        "Then {hero} had the {craft.part}, and {treat.a} as well, and ran home to make the {craft}.",
        '"Take the {craft.part}," said {keeper} {how}, "and {treat.a} for your {kin}."',
    ),
    "give": (
        '"It is the best {colour} {craft} of all," {said} {hero.his} {kin}.',
        "{hero.His} {kin} took the {craft} {how} and [cried|laughed|danced|sang].",
        '"Who helped you?" asked {hero.his} {kin}. "{keeper} the {trade}," {hero} said {how}.',
        "{kin.He} put the {colour} {craft} by the {strange} [window|door|lamp], and {hero} ate the {treat}.",
    ),
}

STRAY = {
    "find": (
        "Then {hero.he} and {hero.his} friend {friend} found {odd} {young} [under|behind|near] {odd} [box|tree|wall|wagon].",
        "{friend} came to the door with {odd} {young}.",
        '"Look, {hero}!" called {friend}. There sat {odd} {young}, all alone.',
    ),
    "state": (
        "It was [cold|quiet|sad|afraid], and had {clue} on its feet.",
        "It had [big|sad|bright|sleepy] eyes, and {clue} on its [nose|back|ears].",
        "There was a [red|blue|green|yellow] string around its neck, and its feet were full of {clue}.",
    ),
    "tag": (
        '"I will call {pet.him} {pet}," {said} {friend}.',
        "{friend} gave {pet.him} {odd} [bell|scarf|ball] and named {pet.him} {pet}.",
        '"{pet.His} name is {pet}," {friend} said {how}.',
    ),
    "feed": (
        "They gave {pet} {treat.a}, and {pet.he} ate it {how}.",
        "{hero} brought {treat.a}, but the {young} [ran away|only looked at it|shut {pet.his} eyes].",
        "{pet} would not eat, not even {treat.a}.",
    ),
    "think": (
        '"{clue.start}," {hero.he} said {how}. "{pet.He} must come from the {clue.home}!"',
        '"Wait," {said} {friend}. "{clue.start} can only come from the {clue.home}."',
        'Then {hero} looked at the {clue} again. "The {clue.home}!" {hero.he} cried.',
    ),
    "reunion": (
        "So they went to the {clue.home}. There stood {pet.his} mother, {odd} [one|beast] with [bright|sad|big] eyes.",
        "They carried {pet} to the {clue.home} in {odd} [basket|box|bag], and {pet.he} ran {how} to {pet.his} mother.",
        "At the {clue.home} the mother of the {young} [came out|looked at {friend}|took {pet.him} home] {how}.",
    ),
    "parting": (
        '"Come and see us {place}, {pet}," {said} {friend}, and gave {pet.him} the {treat}.',
        "{hour.later}, the two friends had [more|the last of the] {treat} and talked about the {young}.",
        "{hour.later}, {friend} and {hero} [sat|slept|danced] at home, and the floor was full of {clue}.",
        '"Goodbye, {pet}," {said} {hero}, and {friend} [waved|cried|smiled].',
    ),
}

QUARREL = {
    "both": (
        "{hero} and {hero.his} friend {friend} [shared|had found|had made] {colour.a} {toy}.",
        "{hero.His} best friend was {friend}, who had {colour.a} {toy}.",
        "{friend} came by with {odd} bag, and in it was {colour.a} {toy}.",
    ),
    "want": (
        '"It is my turn," {said} {friend}. "No, mine!" {said} {hero}.',
        "{hero} would not let go of the {toy}, and {friend} [held on|pulled] as well.",
        '"You always have the {toy}," {friend} said {how}. {hero} held on to it.',
    ),
    "break": (
        "They pulled [and pulled|{how}], until {toy.broke}.",
        "[Suddenly|All at once|Then] {toy.broke}.",
        "{hero} pulled, {friend} [fell|slid|jumped], and {toy.broke}.",
    ),
    "blame": (
        '"That was you!" {said} {friend}. "It was not," {said} {hero}, and [ran away|looked away|turned around].',
        "{friend} threw {odd} [box|stone|shoe], and {hero} [cried|went home|said nothing].",
        "For {number} days they did not speak to each other.",
        '"Now nobody has {colour.a} {toy}," {said} {hero}.',
    ),
    "advice": (
        "{hero.His} {kin} [saw|heard] it and gave them {treat.a}.",
        '"Sit down and have {treat.a}," {hero.his} {kin} said {how}.',
        "{hero.His} {kin} said nothing, but put {treat.a} and {odd} [knife|cup|lamp] between the two.",
    ),
    "sorry": (
        '"I am sorry, {friend}," {said} {hero}. "So am I," {said} {friend}.',
        '{friend} looked at {hero} {how}. "Come, help me with the {toy}."',
        "{hero} gave {friend.him} more of the {treat}. {friend} began to [smile|laugh|cry].",
    ),
    "mend": (
        "With {toy.with} and {odd} [needle|knife|hammer] they made the {toy} whole again.",
        "It took {toy.with} and [two|three|four|five] hours, but {hero} and {friend} [sang|laughed] all the while.",
        "{friend} held it, {hero} brought {toy.with}, and soon the {colour} {toy} was whole.",
    ),
    "turns": (
        "Now {friend} had it in the [morning|afternoon|evening] and {hero} at night.",
        '"You first, {friend}," {said} {hero}. "No, you, {hero}," {said} {friend}.',
        "The {colour} {toy} was [plain|odd|heavy] now, but {hero} and {friend} loved it more.",
    ),
}

NIGHT = {
    "wake": (
        "That night {hero.he} woke up. Something {noise.did} in the {room}.",
        "That night {odd} {noise} came from the {room}, and {hero} sat up {how}.",
        '"What is that {noise}?" {said} {hero} that night. It came from the {room}.',
    ),
    "dread": (
        '"It may be {fear.a}," {hero.he} said {how}, and hid under {odd} [blanket|coat|hat].',
        "{hero.He} had [heard|read] about {odd} {fear} that day, and could not move.",
        "It was like {odd} {fear} with [cold hands|heavy boots|big teeth|sad eyes].",
    ),
    "rouse": (
        '{hero.He} woke {hero.his} friend {friend}. "[Wait|Wake up|Help me|Come], {friend}!" {said} {hero}.',
        '{hero.His} friend {friend} had heard it too. "What was that, {hero}?" {friend.he} said {how}.',
        'Nearby slept {friend}. "I heard it too," {friend.he} said {how}.',
    ),
    "light": (
        "{friend} took {colour.a} lamp, and {hero} took {odd} [stick|bucket|hammer|knife|chair].",
        "They found {colour.a} lamp in {odd} [box|bag|basket].",
        "{hero} took {colour.a} lamp, and {friend} put on {odd} [hat|coat|mask].",
    ),
    "truth": (
        "There was no {fear} at all. It was {noise.cause}.",
        '"That is no {fear}," {said} {friend}. It was {noise.cause}.',
        "What {noise.did} there was {noise.cause}.",
    ),
    "calm": (
        "{hero} {noise.calm} {how}, and the {noise} [stopped|went away].",
        "{friend} {noise.calm}, and {hero} held the {colour} lamp.",
        "They laughed {how}. Then {hero} {noise.calm}.",
    ),
    "supper": (
        "{hero.His} {kin} came in {how} and gave them {treat.a}.",
        '"I want {treat.a}," {said} {friend}, and {hero.his} {kin} brought it {how}.',
        "They could not sleep, so {hero.his} {kin} brought {treat.a} and {odd} book.",
    ),
}


def _shape(own: Mapping[str, tuple[str, ...]], slots: str) -> Story:
    """A story shape: opening and scene, its own rules one after the other, and the moral."""
    body = " ".join(f"{{{rule}}}" for rule in ("open", "scene", *own, "moral"))
    return story([SLOTS[name] for name in f"hero trait place hour {slots}".split()], COMMON | dict(own), body)


SHAPES = {
    "lost": _shape(LOST, "kin colour reach thing spot beast pet treat"),
    "gift": _shape(GIFT, "kin colour craft keeper trade chore count treat"),
    "stray": _shape(STRAY, "friend young clue pet treat"),
    "quarrel": _shape(QUARREL, "friend kin colour toy treat"),
    "night": _shape(NIGHT, "friend room noise fear colour kin treat"),
}
STORIES = Grammar(Choice((3.0, 2.0, 2.0, 2.0, 2.0), tuple(SHAPES.values())))
