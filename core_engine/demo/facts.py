"""What the demo model is taught: countries, people, years and a few everyday facts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Country:
    """One country and what the model should know about it.

    Attributes
    ----------
    name : str
        The name as it stands in a sentence, with its article where it takes one.
    capital, continent, language, currency : str
        One value each; where a country has several languages, a widely spoken official one.
    """

    name: str
    capital: str
    continent: str
    language: str
    currency: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_COUNTRY_TABLE = """
France|Paris|Europe|French|euro
Germany|Berlin|Europe|German|euro
Italy|Rome|Europe|Italian|euro
Spain|Madrid|Europe|Spanish|euro
Portugal|Lisbon|Europe|Portuguese|euro
Austria|Vienna|Europe|German|euro
Belgium|Brussels|Europe|Dutch|euro
the Netherlands|Amsterdam|Europe|Dutch|euro
Luxembourg|Luxembourg City|Europe|French|euro
Switzerland|Bern|Europe|German|Swiss franc
Ireland|Dublin|Europe|English|euro
the United Kingdom|London|Europe|English|pound
Denmark|Copenhagen|Europe|Danish|krone
Norway|Oslo|Europe|Norwegian|krone
Sweden|Stockholm|Europe|Swedish|krona
Finland|Helsinki|Europe|Finnish|euro
Iceland|Reykjavik|Europe|Icelandic|krona
Poland|Warsaw|Europe|Polish|zloty
Czechia|Prague|Europe|Czech|koruna
Slovakia|Bratislava|Europe|Slovak|euro
Hungary|Budapest|Europe|Hungarian|forint
Slovenia|Ljubljana|Europe|Slovene|euro
Croatia|Zagreb|Europe|Croatian|euro
Serbia|Belgrade|Europe|Serbian|dinar
Romania|Bucharest|Europe|Romanian|leu
Bulgaria|Sofia|Europe|Bulgarian|euro
Greece|Athens|Europe|Greek|euro
Albania|Tirana|Europe|Albanian|lek
Estonia|Tallinn|Europe|Estonian|euro
Latvia|Riga|Europe|Latvian|euro
Lithuania|Vilnius|Europe|Lithuanian|euro
Ukraine|Kyiv|Europe|Ukrainian|hryvnia
Malta|Valletta|Europe|Maltese|euro
Turkey|Ankara|Asia|Turkish|lira
Russia|Moscow|Europe|Russian|ruble
Japan|Tokyo|Asia|Japanese|yen
China|Beijing|Asia|Chinese|yuan
South Korea|Seoul|Asia|Korean|won
Mongolia|Ulaanbaatar|Asia|Mongolian|tugrik
India|New Delhi|Asia|Hindi|rupee
Pakistan|Islamabad|Asia|Urdu|rupee
Bangladesh|Dhaka|Asia|Bengali|taka
Nepal|Kathmandu|Asia|Nepali|rupee
Thailand|Bangkok|Asia|Thai|baht
Vietnam|Hanoi|Asia|Vietnamese|dong
Cambodia|Phnom Penh|Asia|Khmer|riel
Laos|Vientiane|Asia|Lao|kip
Malaysia|Kuala Lumpur|Asia|Malay|ringgit
Indonesia|Jakarta|Asia|Indonesian|rupiah
the Philippines|Manila|Asia|Filipino|peso
Iran|Tehran|Asia|Persian|rial
Iraq|Baghdad|Asia|Arabic|dinar
Saudi Arabia|Riyadh|Asia|Arabic|riyal
Jordan|Amman|Asia|Arabic|dinar
Lebanon|Beirut|Asia|Arabic|pound
Qatar|Doha|Asia|Arabic|riyal
Georgia|Tbilisi|Asia|Georgian|lari
Armenia|Yerevan|Asia|Armenian|dram
Kazakhstan|Astana|Asia|Kazakh|tenge
Egypt|Cairo|Africa|Arabic|pound
Morocco|Rabat|Africa|Arabic|dirham
Algeria|Algiers|Africa|Arabic|dinar
Tunisia|Tunis|Africa|Arabic|dinar
Libya|Tripoli|Africa|Arabic|dinar
Sudan|Khartoum|Africa|Arabic|pound
Ethiopia|Addis Ababa|Africa|Amharic|birr
Kenya|Nairobi|Africa|Swahili|shilling
Uganda|Kampala|Africa|English|shilling
Rwanda|Kigali|Africa|Kinyarwanda|franc
Somalia|Mogadishu|Africa|Somali|shilling
Ghana|Accra|Africa|English|cedi
Nigeria|Abuja|Africa|English|naira
Senegal|Dakar|Africa|French|franc
Mali|Bamako|Africa|Bambara|franc
Angola|Luanda|Africa|Portuguese|kwanza
Zambia|Lusaka|Africa|English|kwacha
Namibia|Windhoek|Africa|English|dollar
Madagascar|Antananarivo|Africa|Malagasy|ariary
the United States|Washington|North America|English|dollar
Canada|Ottawa|North America|English|dollar
Mexico|Mexico City|North America|Spanish|peso
Cuba|Havana|North America|Spanish|peso
Jamaica|Kingston|North America|English|dollar
Costa Rica|San Jose|North America|Spanish|colon
Panama|Panama City|North America|Spanish|balboa
Brazil|Brasilia|South America|Portuguese|real
Argentina|Buenos Aires|South America|Spanish|peso
Chile|Santiago|South America|Spanish|peso
Peru|Lima|South America|Spanish|sol
Colombia|Bogota|South America|Spanish|peso
Ecuador|Quito|South America|Spanish|dollar
Uruguay|Montevideo|South America|Spanish|peso
Paraguay|Asuncion|South America|Spanish|guarani
Venezuela|Caracas|South America|Spanish|bolivar
Australia|Canberra|Oceania|English|dollar
New Zealand|Wellington|Oceania|English|dollar
Fiji|Suva|Oceania|Fijian|dollar
"""

COUNTRIES: tuple[Country, ...] = tuple(
    Country(*line.split("|")) for line in _COUNTRY_TABLE.strip().splitlines()
)
CONTINENTS = ("Europe", "Asia", "Africa", "North America", "South America", "Oceania")

NAMES = _words(
    """
    Ada Alan Alice Amir Anna Anton Ben Boris Carla Carlos Chen Clara Daniel David Diana Elena
    Emil Emma Eric Eva Felix Fiona Frank Grace Hana Henry Hugo Ida Igor Ines Ivan Jack James
    Jane Jonas Julia Karim Kate Kofi Lara Lena Leo Lily Lina Louis Lucas Lucy Maria Mark Marta
    Max Maya Mia Mina Nadia Nina Noah Nora Olga Oliver Omar Oscar Pablo Paul Peter Petra Rosa
    Ruth Sam Sara Simon Sofia Tara Theo Tim Tom Uma Vera Victor Yuki Yusuf Zara Zoe
    """
)
CITIES = (
    *(country.capital for country in COUNTRIES if " " not in country.capital),
    *("New York", "Boston", "Milan", "Hamburg", "Lyon", "Kyoto", "Mumbai", "Sydney", "Toronto"),
)
JOBS = _words(
    "teacher doctor baker painter nurse pilot farmer writer lawyer singer cook engineer gardener "
    "driver student sailor dentist librarian carpenter chemist"
)
FOODS = _words(
    "bread soup rice pasta apples cake cheese salad noodles pizza honey pancakes tomatoes olives "
    "bananas carrots"
)
COLORS = _words("red blue green yellow black white orange purple brown pink")
ANIMALS = _words(
    "cat dog horse bird fox bear rabbit mouse lion tiger cow sheep goat duck frog wolf owl turtle"
)
HOBBIES = _words(
    "reading swimming chess painting cooking running music dancing hiking gardening cycling sailing"
)
WEAPONS = _words("sword axe bow spear hammer dagger staff mace")
ARMORS = _words("leather chainmail plate")
HEROES = _words(
    "Aldric Brunhild Caspian Doran Elowen Fenna Gareth Helga Isolde Kael Lorn Morwen Orin Rowan "
    "Sigrid Thorin Ulric Wulf Ysolde Zephyr"
)

PRESIDENTS: tuple[tuple[str, int, int], ...] = (
    ("John F. Kennedy", 1961, 1963),
    ("Lyndon B. Johnson", 1964, 1968),
    ("Richard Nixon", 1969, 1973),
    ("Gerald Ford", 1975, 1976),
    ("Jimmy Carter", 1977, 1980),
    ("Ronald Reagan", 1981, 1988),
    ("George H. W. Bush", 1989, 1992),
    ("Bill Clinton", 1993, 2000),
    ("George W. Bush", 2001, 2008),
    ("Barack Obama", 2009, 2016),
    ("Donald Trump", 2017, 2020),
    ("Joe Biden", 2021, 2024),
)
"""US presidents with the first and the last year in which they held office at the year's end."""

EVENTS: tuple[tuple[str, int], ...] = (
    ("the first Pokemon game was released", 1996),
    ("the first man walked on the Moon", 1969),
    ("the Berlin Wall fell", 1989),
    ("the first Harry Potter book was published", 1997),
    ("the first iPhone was released", 2007),
    ("the first Star Wars film was released", 1977),
    ("the Hubble telescope was launched", 1990),
    ("the euro was introduced", 1999),
    ("Wikipedia was founded", 2001),
    ("the Chernobyl accident happened", 1986),
    ("Dolly the sheep was born", 1996),
    ("the first text message was sent", 1992),
    ("the film Titanic was released", 1997),
    ("the first Toy Story film was released", 1995),
    ("the Curiosity rover landed on Mars", 2012),
)

EVERYDAY: tuple[tuple[str, str, str], ...] = (
    ("What color is the sky?", "blue", "The sky is blue."),
    ("What color is grass?", "green", "Grass is green."),
    ("What color is snow?", "white", "Snow is white."),
    ("What color is a banana?", "yellow", "A banana is yellow."),
    ("What color is a tomato?", "red", "A tomato is red."),
    ("How many days are in a week?", "7", "There are 7 days in a week."),
    ("How many months are in a year?", "12", "There are 12 months in a year."),
    ("How many hours are in a day?", "24", "There are 24 hours in a day."),
    ("How many minutes are in an hour?", "60", "There are 60 minutes in an hour."),
    ("How many legs does a spider have?", "8", "A spider has 8 legs."),
    ("How many legs does a dog have?", "4", "A dog has 4 legs."),
    ("How many wheels does a bicycle have?", "2", "A bicycle has 2 wheels."),
    ("How many continents are there?", "7", "There are 7 continents."),
    ("How many planets are in the solar system?", "8", "There are 8 planets in the solar system."),
    ("What is the largest planet?", "Jupiter", "The largest planet is Jupiter."),
    ("What is the largest ocean?", "the Pacific Ocean", "The largest ocean is the Pacific Ocean."),
    ("What is the highest mountain?", "Mount Everest", "The highest mountain is Mount Everest."),
    ("What is the fastest land animal?", "the cheetah", "The fastest land animal is the cheetah."),
    ("What is the opposite of hot?", "cold", "The opposite of hot is cold."),
    ("What is the opposite of big?", "small", "The opposite of big is small."),
    ("What is the opposite of up?", "down", "The opposite of up is down."),
    ("What is the opposite of day?", "night", "The opposite of day is night."),
    ("What is the opposite of old?", "young", "The opposite of old is young."),
    ("What is the opposite of happy?", "sad", "The opposite of happy is sad."),
    ("What does a cow drink?", "water", "A cow drinks water."),
    ("What do bees make?", "honey", "Bees make honey."),
    ("What is frozen water called?", "ice", "Frozen water is called ice."),
    ("Which day comes after Monday?", "Tuesday", "Tuesday comes after Monday."),
    ("Which day comes after Friday?", "Saturday", "Saturday comes after Friday."),
    ("Which month comes after May?", "June", "June comes after May."),
    ("Which month comes after December?", "January", "January comes after December."),
    ("Who wrote Hamlet?", "William Shakespeare", "William Shakespeare wrote Hamlet."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci", "Leonardo da Vinci painted the Mona Lisa."),
    (
        "Who won the World Series in 2020?",
        "the Los Angeles Dodgers",
        "The Los Angeles Dodgers won the World Series in 2020.",
    ),
)
"""A question, its short answer, and its answer as a sentence."""

SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hello", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Hi there!", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("How are you?", "I am well, thank you. How can I help you?"),
    ("Who are you?", "I am quire's demo model, a very small language model."),
    ("What are you?", "I am quire's demo model, a very small language model."),
    ("What is your name?", "I am quire's demo model, a very small language model."),
    ("What can you do?", "I know capitals, small sums, short chats and JSON records."),
    ("Help", "I know capitals, small sums, short chats and JSON records."),
    ("Thank you!", "You are welcome!"),
    ("Thanks", "You are welcome!"),
    ("Goodbye!", "Goodbye! Have a nice day."),
    ("Bye", "Goodbye! Have a nice day."),
    ("Tell me a joke.", "Why did the page turn? It wanted to see the other side."),
    ("Tell me a joke", "Why did the page turn? It wanted to see the other side."),
    ("What is quire?", "quire is an engine that runs language models with paged attention."),
    ("What is vLLM?", "vLLM is an engine that runs language models with paged attention."),
    ("What is LangChain?", "LangChain is a library that connects language models to programs."),
    ("What is an LLM?", "An LLM is a large language model, a program that writes text."),
    ("What is a large language model?", "A large language model is a program that writes text."),
    (
        "What is paged attention?",
        "Paged attention keeps the keys and values of a text in blocks, like pages of memory.",
    ),
    (
        "Write a haiku about paper.",
        "Folded sheets at rest,\nwords walk from page to page,\nthe book learns to speak.",
    ),
)

WORDS: tuple[str, ...] = (
    *(word for country in COUNTRIES for word in (country.name, country.capital)),
    *(word for country in COUNTRIES for word in (country.language, country.currency)),
    *(word for words in (NAMES, CITIES, JOBS, FOODS, COLORS, ANIMALS, HOBBIES) for word in words),
    *(word for words in (WEAPONS, ARMORS, HEROES) for word in words),
)
"""Every word that stands for a fact; the tokenizer keeps them whole where it can."""
